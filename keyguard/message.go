package keyguard

import (
	"fmt"
	"strings"
	"time"
)

// Headline is the first line of every message about the key.
func (s Status) Headline() string {
	if s.Ready() {
		return "External encryption key is ready"
	}
	return "External encryption key is not ready"
}

// Cause tells in one or two sentences why the key is in its state and what that
// means for the data. The countdown to a deletion is as of now.
func (s Status) Cause() string { return s.causeAt(time.Now()) }

// expiryNotice is how long before its end expiring key material is mentioned.
const expiryNotice = 14 * 24 * time.Hour

// NextStep tells what to do, with the exact command; "" if nothing is to be done.
func (s Status) NextStep() string { return s.nextStep() }

func (s Status) causeAt(now time.Time) string {
	cause := s.causeAlone(now)
	if s.Key.refuses() && len(s.Siblings) > 0 {
		cause += fmt.Sprintf(" The other keys of its multi-Region set (%s) are enabled and disabled on their own; byokd does not turn to them.",
			strings.Join(s.Siblings, ", "))
		if len(s.SiblingsEnabled) > 0 {
			cause += fmt.Sprintf(" Still enabled: %s. Whoever may use it can still decrypt this data; to take that away as well, disable it, too.",
				strings.Join(s.SiblingsEnabled, ", "))
		}
	}
	return cause + s.recorded()
}

func (s Status) causeAlone(now time.Time) string {
	switch s.Key {
	case Enabled:
		return s.causeEnabled(now)
	case Disabled:
		return fmt.Sprintf("The AWS KMS key %s is disabled. %s", s.KeyARN, s.data())
	case PendingDeletion:
		return fmt.Sprintf("The AWS KMS key %s is scheduled for deletion%s. %s", s.KeyARN, s.countdown(now), s.data())
	case Deleted:
		return fmt.Sprintf("The AWS KMS key %s has been deleted. This is final: the data it protects can never be decrypted again.", s.KeyARN)
	case AccessDenied:
		return fmt.Sprintf("%s by the policies of the AWS KMS key %s%s. %s", s.deniedWho(), s.KeyARN, s.inWords(), s.data())
	case Unavailable:
		return fmt.Sprintf("The AWS KMS key %s is unavailable: %s%s. %s", s.KeyARN, unavailableWhy(s.Reason), s.inWords(), s.data())
	case Misconfigured:
		return fmt.Sprintf("The AWS KMS key %s cannot be used: %s%s.", s.KeyARN, misconfiguredWhy(s.Reason), s.inWords())
	case Unreachable:
		return fmt.Sprintf("AWS KMS cannot be asked for the key %s: %s%s. %s", s.KeyARN, unreachableWhy(s.Reason), s.inWords(), s.outage(now))
	default:
		return fmt.Sprintf("Waiting for the first answer of AWS KMS about the key %s.", s.KeyARN)
	}
}

func (s Status) causeEnabled(now time.Time) string {
	switch {
	case s.Ready() && !s.MaterialExpires.IsZero() && s.MaterialExpires.Sub(now) < expiryNotice:
		return fmt.Sprintf("The AWS KMS key %s is enabled, but its imported key material expires on %s (in %s); all reads and writes will then wait.",
			s.KeyARN, stamp(s.MaterialExpires), span(s.MaterialExpires.Sub(now)))
	case s.Ready() && s.Reason == ReasonSlow:
		return fmt.Sprintf("The AWS KMS key %s is enabled, but AWS KMS answers slowly (more than %v).", s.KeyARN, slowAnswer)
	case s.Ready() && s.Warning != "":
		return fmt.Sprintf("The AWS KMS key %s is enabled, but %s.", s.KeyARN, s.Warning)
	case s.Ready():
		return fmt.Sprintf("The AWS KMS key %s is enabled and may be used.", s.KeyARN)
	case s.Gate == Stopping:
		return "byokd is stopping."
	case s.OperatorFreeze:
		return fmt.Sprintf("Access is frozen on request%s; the AWS KMS key %s is enabled. %s", s.askedBy(), s.KeyARN, s.data())
	default:
		return fmt.Sprintf("The AWS KMS key %s is enabled again; access is about to be restored.", s.KeyARN)
	}
}

// recorded tells of an operator's request that waits for the key.
func (s Status) recorded() string {
	switch {
	case s.Gate == Stopping || s.Key == Enabled || s.Key == Deleted || s.Ready():
		return ""
	case s.OperatorFreeze:
		return fmt.Sprintf(" A freeze was asked for%s: access stays frozen when the key is back.", s.askedBy())
	case s.OperatorPending == ThawIntent:
		return fmt.Sprintf(" A thaw was asked for%s; it is carried out when the key is back.", s.askedBy())
	}
	return ""
}

func (s Status) askedBy() string {
	if s.OperatorBy == "" {
		return ""
	}
	return fmt.Sprintf(" (%s, %s)", s.OperatorBy, stamp(s.OperatorSince))
}

// data tells what the refusal means for the data.
func (s Status) data() string {
	switch s.Gate {
	case Starting:
		if s.Resumes {
			return "All reads and writes of what is mounted wait, as before byokd was started again; nothing is lost."
		}
		if s.Key == Enabled {
			return "Nothing is mounted or served until it is taken back."
		}
		return "Nothing is mounted or served until the key is usable."
	case Open, Degraded, Draining:
		return "Access is being stopped."
	default:
		return "All reads and writes wait; nothing is lost."
	}
}

func (s Status) outage(now time.Time) string {
	switch {
	case s.Gate == Degraded && s.LeaseUntil.After(now):
		return fmt.Sprintf("Work goes on until %s (in %s), then all reads and writes wait.",
			stamp(s.LeaseUntil), span(s.LeaseUntil.Sub(now)))
	case s.Gate == Degraded:
		return "The grace period is over; access is being stopped."
	default:
		return s.data()
	}
}

func (s Status) countdown(now time.Time) string {
	switch {
	case s.DeletionDate.IsZero():
		return ""
	case s.DeletionDate.After(now):
		return fmt.Sprintf(" on %s (in %s)", stamp(s.DeletionDate), span(s.DeletionDate.Sub(now)))
	default:
		return fmt.Sprintf(" since %s, any moment now", stamp(s.DeletionDate))
	}
}

func (s Status) deniedWho() string {
	action := s.MissingAction
	if action == "" {
		action = "kms:Decrypt"
	}
	if s.Principal == "" {
		return fmt.Sprintf("%s is denied to byokd's role", action)
	}
	return fmt.Sprintf("%s is denied to %s", action, s.Principal)
}

// inWords quotes KMS, on one line.
func (s Status) inWords() string {
	detail := strings.TrimRight(strings.Join(strings.Fields(s.Detail), " "), ".")
	if detail == "" {
		return ""
	}
	return fmt.Sprintf(" (%s)", detail)
}

func unavailableWhy(r Reason) string {
	switch r {
	case ReasonPendingImport:
		return "its imported key material is missing or has expired"
	case ReasonKeyStoreDown:
		return "its custom key store is not connected"
	case ReasonKeyCreating:
		return "it is still being created"
	default:
		return "AWS KMS reports an invalid key state"
	}
}

func misconfiguredWhy(r Reason) string {
	switch r {
	case ReasonKeyNotFound:
		return "AWS KMS knows no such key in this region and account"
	case ReasonWrongKey:
		return "the data was encrypted under another key"
	case ReasonInvalidCiphertext:
		return "the wrapped key is damaged or belongs to another cluster, volume or bucket"
	case ReasonWrongKind:
		return "it is not a symmetric key for encryption and decryption"
	case ReasonWrongRegion:
		return "it is in another region"
	default:
		return "AWS KMS refuses the request as invalid"
	}
}

func unreachableWhy(r Reason) string {
	switch r {
	case ReasonThrottled:
		return "requests are being throttled"
	case ReasonServiceFault:
		return "the service reports an internal failure"
	case ReasonTimeout:
		return "it does not answer"
	case ReasonDNS:
		return "its host name cannot be resolved"
	case ReasonTLS:
		return "no trusted TLS connection can be made"
	case ReasonConnection:
		return "no connection can be made or it is cut"
	case ReasonCredentials:
		return "byokd has no valid AWS credentials"
	case ReasonClockSkew:
		return "this machine's clock is wrong"
	case ReasonKeyStoreDown:
		return "its custom key store does not answer"
	case ReasonInvalidState:
		return "it cannot use the key at the moment although the key is enabled"
	default:
		return "it gives an answer that byokd does not know"
	}
}

func (s Status) nextStep() string {
	switch s.Key {
	case Disabled:
		return "Enable the key: " + s.cli("enable-key")
	case PendingDeletion:
		return "Cancel the deletion and then enable the key (both are needed, cancelling leaves it disabled): " +
			s.cli("cancel-key-deletion") + " && " + s.cli("enable-key")
	case Deleted:
		return "There is no way back for this key. Delete no data (byokd never does): the same key of a multi-Region set in another region, if there is one, still decrypts it. To go on, restore a backup under another key or set up a new cluster."
	case AccessDenied:
		return s.stepDenied()
	case Unavailable:
		return s.stepUnavailable()
	case Misconfigured:
		return s.stepMisconfigured()
	case Unreachable:
		return s.stepUnreachable()
	case Enabled:
		if s.Ready() && s.Warning != "" {
			return "Allow byokd's role what the documented key policy allows: " + s.putPolicy()
		}
		if s.OperatorFreeze && s.Gate != Stopping {
			return "When the reason for the freeze is gone: byokd thaw" + s.socketFlag()
		}
	}
	return ""
}

func (s Status) stepDenied() string {
	action, who := s.MissingAction, s.Principal
	if action == "" {
		action = "kms:Decrypt"
	}
	if who == "" {
		who = "byokd's role"
	}
	return fmt.Sprintf("Allow %s to %s in the key policy (`byokd key policy` prints the documented one): %s", action, who, s.putPolicy())
}

func (s Status) stepUnavailable() string {
	switch s.Reason {
	case ReasonPendingImport:
		return "Import the same key material again: " + s.cli("get-parameters-for-import") +
			" --wrapping-algorithm RSAES_OAEP_SHA_256 --wrapping-key-spec RSA_4096, then " + s.cli("import-key-material") +
			" --import-token fileb://token --encrypted-key-material fileb://material --expiration-model KEY_MATERIAL_DOES_NOT_EXPIRE"
	case ReasonKeyStoreDown:
		return fmt.Sprintf("Find the key store and connect it: %[1]s describe-custom-key-stores --region %[2]s, then %[1]s connect-custom-key-store --custom-key-store-id ID --region %[2]s", s.aws(), s.region())
	default:
		return "See what AWS says about the key: " + s.cli("describe-key")
	}
}

func (s Status) stepMisconfigured() string {
	switch s.Reason {
	case ReasonKeyNotFound, ReasonWrongRegion:
		return "Correct the key ARN in the configuration; this shows whether AWS knows it: " + s.cli("describe-key")
	case ReasonWrongKind:
		return "Make a symmetric key for encryption and decryption and name it in the configuration: " + s.aws() + " create-key"
	case ReasonWrongKey, ReasonInvalidCiphertext:
		return "Name the key, cluster and resource in the configuration under which this data was written (byokd.volume at the root of the lower directory names the key); to move it to another key: byokd key rewrap"
	default:
		return "Check the key in the configuration: " + s.cli("describe-key")
	}
}

func (s Status) stepUnreachable() string {
	region := s.region()
	switch s.Reason {
	case ReasonThrottled:
		return fmt.Sprintf("Raise the quota \"Cryptographic operations (symmetric) request rate\" of AWS KMS in %s, or lower the load on it: aws service-quotas list-service-quotas --service-code kms --region %s", region, region)
	case ReasonInvalidState, ReasonKeyStoreDown:
		return fmt.Sprintf("If the key lives in a custom key store, see whether it is connected: %s describe-custom-key-stores --region %s; byokd goes on by itself.", s.aws(), region)
	case ReasonCredentials:
		return "Check the pod's AWS credentials (IRSA or Pod Identity of its service account): aws sts get-caller-identity --region " + region
	case ReasonClockSkew:
		return "Set this machine's clock (chrony, NTP); AWS refuses requests that are more than 5 minutes off."
	case ReasonDNS, ReasonConnection, ReasonTimeout, ReasonTLS:
		address := s.Endpoint
		if address == "" {
			address = "kms." + region + ".amazonaws.com:443"
		}
		return fmt.Sprintf("Check DNS, network policy, proxy and VPC endpoint between this pod and %s; byokd goes on by itself.", address)
	default:
		return "See https://health.aws.amazon.com for AWS KMS in " + region + "; byokd goes on by itself."
	}
}

func (s Status) putPolicy() string {
	return s.cli("put-key-policy") + " --policy-name default --policy file://policy.json"
}

func (s Status) cli(command string) string {
	return fmt.Sprintf("%s %s --key-id %s --region %s", s.aws(), command, s.KeyARN, s.region())
}

// aws begins a command about the key.
func (s Status) aws() string {
	if s.Endpoint == "" {
		return "aws kms"
	}
	return "aws --endpoint-url " + s.Endpoint + " kms"
}

func (s Status) socketFlag() string {
	if s.Socket == "" {
		return ""
	}
	return " --socket " + s.Socket
}

// region is the fourth part of arn:partition:kms:region:account:key/id.
func (s Status) region() string {
	if parts := strings.SplitN(s.KeyARN, ":", 6); len(parts) == 6 && parts[3] != "" {
		return parts[3]
	}
	return "REGION"
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// span gives a duration in the two units that matter.
func span(d time.Duration) string {
	d = d.Round(time.Second)
	days, hours := int(d/(24*time.Hour)), int(d%(24*time.Hour)/time.Hour)
	minutes, seconds := int(d%time.Hour/time.Minute), int(d%time.Minute/time.Second)
	switch {
	case days > 0:
		return fmt.Sprintf("%d d %d h", days, hours)
	case hours > 0:
		return fmt.Sprintf("%d h %d min", hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%d min %d s", minutes, seconds)
	default:
		return fmt.Sprintf("%d s", seconds)
	}
}
