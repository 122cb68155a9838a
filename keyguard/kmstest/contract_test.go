package kmstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
)

// TestContract holds everything that byokd relies on against several KMS: this
// stand-in, moto (which nobody here has written), and AWS itself when
// BYOKD_KMS_KEY_ARN names an enabled symmetric key of a real account and the
// standard chain has credentials for it. So the stand-in cannot drift unnoticed.
//
// In a real account nothing is changed, unless BYOKD_KMS_CREATE=1: then keys are
// made, used, and scheduled for deletion in seven days.
func TestContract(t *testing.T) {
	t.Run("stand-in", func(t *testing.T) {
		w := newWorld(t, Options{})
		runContract(t, &subject{admin: w.admin, user: w.tenant, key: w.arn, makes: true, policy: DocumentedPolicy(DefaultAccount, TenantRole),
			elsewhere: func(region string) *kms.Client { return clientOf(w.URL(), region, TenantAccessKey, TenantSecret) }}, nil)
	})
	t.Run("moto", func(t *testing.T) {
		endpoint := startMoto(t)
		c := clientOf(endpoint, DefaultRegion, "id", "secret")
		s := &subject{admin: c, user: c, makes: true,
			elsewhere: func(region string) *kms.Client { return clientOf(endpoint, region, "id", "secret") }}
		s.key = s.create(t, false)
		runContract(t, s, motoDiffers)
	})
	t.Run("aws", func(t *testing.T) {
		arn := os.Getenv("BYOKD_KMS_KEY_ARN")
		if arn == "" {
			t.Skip("BYOKD_KMS_KEY_ARN names no key of a real account")
		}
		cfg, err := config.LoadDefaultConfig(t.Context(), config.WithRegion(strings.Split(arn, ":")[3]))
		if err != nil {
			t.Fatal(err)
		}
		c := kms.NewFromConfig(cfg)
		runContract(t, &subject{admin: c, user: c, key: arn, makes: os.Getenv("BYOKD_KMS_CREATE") == "1",
			elsewhere: func(region string) *kms.Client {
				return kms.NewFromConfig(cfg, func(o *kms.Options) { o.Region = region })
			}}, nil)
	})
}

// motoDiffers lists where moto is not like AWS, by check, with what it does
// instead. AWS's documentation decides: each was looked up there, and where the
// stand-in was wrong it was corrected. A check that moto passes may not stand here.
var motoDiffers = map[string]string{
	"an opened ciphertext names its algorithm":                  "moto leaves EncryptionAlgorithm out; AWS's API reference has it in the answer",
	"a dry run tells that the call would succeed":               "moto ignores DryRun and decrypts",
	"a key of another region is not found":                      "moto answers for a key whose ARN names another Region",
	"describe names the current key material":                   "moto does not know CurrentKeyMaterialId",
	"a disabled key is refused by name, and works when enabled": "moto decrypts under a disabled key; only DescribeKey tells",
	"a key whose deletion is scheduled is in an invalid state":  "moto decrypts under a key that is pending deletion; only DescribeKey tells",
	"cancelling a deletion leaves the key disabled":             "moto says Disabled, too, and decrypts all the same",
	"another key is refused":                                    "moto answers AccessDeniedException; AWS's API reference says IncorrectKeyException",
	"rotation changes the material and keeps old ciphertexts":   "moto does not know CurrentKeyMaterialId; old ciphertexts open there as well",
	"a replica opens what the primary has sealed":               "moto binds ciphertexts to the Region's key",
	"primary and replica are disabled apart":                    "moto decrypts under a disabled key and binds ciphertexts to the Region's key",
}

// subject is a KMS under test.
type subject struct {
	admin, user *kms.Client
	key         string // an enabled key
	makes       bool   // keys may be made
	policy      string // of keys that are made; "" the service's default
	elsewhere   func(region string) *kms.Client
}

func clientOf(endpoint, region, id, secret string) *kms.Client {
	return kms.New(kms.Options{Region: region, BaseEndpoint: &endpoint, Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(id, secret, "")})
}

// runContract runs every check. differs are those that must fail, with the reason.
func runContract(t *testing.T, s *subject, differs map[string]string) {
	known := map[string]bool{}
	for _, c := range contract() {
		known[c.name] = true
		t.Run(c.name, func(t *testing.T) {
			if c.makes && !s.makes {
				t.Skip("makes keys: BYOKD_KMS_CREATE=1 allows it")
			}
			err := c.check(t, s)
			switch why, differ := differs[c.name]; {
			case differ && err == nil:
				t.Error("is listed as different, and is not")
			case differ:
				t.Logf("known to differ: %s: %v", why, err)
			case err != nil:
				t.Error(err)
			}
		})
	}
	for name := range differs {
		if !known[name] {
			t.Errorf("%q is listed as different, and there is no such check", name)
		}
	}
}

// create makes a key that goes when the test ends.
func (s *subject) create(t *testing.T, multiRegion bool) string {
	t.Helper()
	in := &kms.CreateKeyInput{MultiRegion: &multiRegion, KeyUsage: types.KeyUsageTypeEncryptDecrypt, Description: aws.String("byokd contract test")}
	if s.policy != "" {
		in.Policy = &s.policy
	}
	arn := *must(s.admin.CreateKey(t.Context(), in))(t).KeyMetadata.Arn
	t.Cleanup(func() {
		_, err := s.admin.ScheduleKeyDeletion(context.Background(), &kms.ScheduleKeyDeletionInput{KeyId: idOf(arn), PendingWindowInDays: aws.Int32(7)})
		var already *types.KMSInvalidStateException
		if err != nil && !errors.As(err, &already) {
			t.Errorf("%s was made and is left behind: %v", arn, err)
		}
	})
	return arn
}

// idOf is the id in a key's ARN. AWS takes either; moto's owner's calls only the id.
func idOf(arn string) *string { return aws.String(arn[strings.LastIndexByte(arn, '/')+1:]) }

var contractContext = map[string]string{"byokd:cluster": "contract", "byokd:resource": "test"}

func (s *subject) wrap(t *testing.T, key string) *kms.GenerateDataKeyOutput {
	t.Helper()
	return must(s.user.GenerateDataKey(t.Context(), &kms.GenerateDataKeyInput{KeyId: &key, NumberOfBytes: aws.Int32(32), EncryptionContext: contractContext}))(t)
}

func (s *subject) open(t *testing.T, key string, blob []byte) (*kms.DecryptOutput, error) {
	t.Helper()
	return s.user.Decrypt(t.Context(), &kms.DecryptInput{KeyId: &key, CiphertextBlob: blob, EncryptionContext: contractContext})
}

// wants compares an error with an AWS error name.
func wants(err error, names ...string) error {
	var api smithy.APIError
	if errors.As(err, &api) {
		for _, name := range names {
			if api.ErrorCode() == name {
				return nil
			}
		}
	}
	return fmt.Errorf("got %v, want %s", err, strings.Join(names, " or "))
}

// startMoto runs moto's server until the test ends.
func startMoto(t *testing.T) (endpoint string) {
	t.Helper()
	program := "../../.cache/moto/bin/moto_server" // the version that motoDiffers is about
	if !executable(program) {
		if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "moto") {
			t.Fatal("BYOKD_REQUIRE names moto, and there is no moto_server")
		}
		t.Skip("there is no moto_server in .cache/moto (test/prepare.sh installs it)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	cmd := exec.Command(program, "-H", "127.0.0.1", "-p", fmt.Sprint(port))
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		if t.Failed() {
			t.Logf("moto said:\n%s", output.String())
		}
	})
	endpoint = fmt.Sprintf("http://127.0.0.1:%d", port)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) { // until it answers
		if response, err := http.Get(endpoint + "/moto-api/"); err == nil {
			response.Body.Close()
			return endpoint
		}
		if time.Now().After(deadline) {
			t.Fatal("moto does not answer")
		}
	}
}

func executable(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.Mode()&0o111 != 0
}

// requestIDOf is what CloudTrail would call the request.
func requestIDOf(out *kms.DecryptOutput) string {
	id, _ := awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
	return id
}
