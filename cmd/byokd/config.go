package main

import (
	"time"

	"github.com/byokd/byokd/fs"
)

// Config is the one configuration file of byokd. The comments on its fields are the manual: they are
// rendered into reference.yaml, which `byokd config reference` prints and a test keeps in step.
// Every scalar can be overridden from the environment: the path in capitals, words and levels joined
// by underscores, after BYOKD_ (admin.listen is BYOKD_ADMIN_LISTEN, keys.primary.probeInterval is
// BYOKD_KEYS_PRIMARY_PROBE_INTERVAL). The environment wins over the file.
type Config struct {
	// The cluster that this data belongs to.
	Cluster ClusterConfig `yaml:"cluster"`
	// The KMS keys, under names that the volume and the buckets refer to. Each key is watched by a
	// keyguard of its own; what names the same key freezes and thaws together. Required.
	Keys map[string]KeyConfig `yaml:"keys"`
	// The encrypted filesystem. Leave it out to serve buckets only.
	Volume *VolumeConfig `yaml:"volume"`
	// The encrypting S3 proxy. Leave it out to serve a volume only.
	Objects *ObjectsConfig `yaml:"objects"`
	// The listener for health, metrics, status and the Encryption at rest panel.
	Admin AdminConfig `yaml:"admin"`
	// The audit trail of key use.
	Audit AuditConfig `yaml:"audit"`
	// Other byokd processes that watch the same keys. Leave it out when there are few.
	Fleet *FleetConfig `yaml:"fleet"`
	// The log on standard error.
	Log LogConfig `yaml:"log"`
	// The longest time that a stop may take (flush, unmount) before byokd gives up waiting and detaches
	// the mount. Keep it below the grace period of whatever stops byokd (30s in Kubernetes).
	StopTimeout Duration `yaml:"stopTimeout"`
}

// ClusterConfig names the cluster in encryption contexts, and so in the key owner's CloudTrail.
type ClusterConfig struct {
	// Name of the cluster. It goes into the KMS encryption context as byokd:cluster, so that the owner
	// of the key sees in CloudTrail who used it, and it is bound to the data: it cannot be changed
	// later. Required.
	ID string `yaml:"id"`
	// The AWS region the cluster runs in. When given, the volume's key must be in it.
	Region string `yaml:"region"`
	// The tenant, for clusters that serve several. It goes into the encryption context as byokd:tenant
	// and is bound to the data like the id.
	Tenant string `yaml:"tenant"`
}

// KeyConfig is one AWS KMS key and how it is watched.
type KeyConfig struct {
	// ARN of a symmetric KMS key for encryption and decryption. An alias is refused: it could be
	// pointed at another key behind the data's back. Required.
	ARN string `yaml:"arn"`
	// Pause between two probes of the key while all is well, from 100ms to 1m. Data freezes at most this
	// long, plus one second, after KMS begins to refuse.
	ProbeInterval Duration `yaml:"probeInterval"`
	// How long reads and writes go on when KMS cannot be reached (an outage, not a refusal), from
	// probeInterval + 2s to 24h. Then they freeze until KMS answers again.
	OutageGrace Duration `yaml:"outageGrace"`
	// In a fleet, the pause to which probes are stretched with the number of its members, so that all of
	// them together ask about once per probeInterval: from probeInterval to outageGrace - 2s; 0s keeps
	// the pause. Hints make up for it when the key itself is taken away. What concerns one pod's role
	// alone is then seen as late as this; the status says so (byokd_freeze_bound_seconds).
	StretchTo Duration `yaml:"stretchTo"`
	// Address of KMS, for a VPC endpoint with a name of its own or for a stand-in. Left out, the SDK's.
	Endpoint string `yaml:"endpoint"`
}

// VolumeConfig is the encrypted filesystem.
type VolumeConfig struct {
	// What the volume holds: orchestration, elasticsearch or another short name. It is shown on the
	// status page ("orchestration disk") and used in metrics.
	Role string `yaml:"role"`
	// The directory below the mount, where the sealed files are kept. An empty one is initialised; one
	// that holds anything byokd has not written is refused. Absolute path. Required.
	Lower string `yaml:"lower"`
	// The directory at which the plain files appear: an empty one, which is made where only its last part is
	// missing. Absolute path. Required, unless mountSocket is given.
	Mount string `yaml:"mount"`
	// The socket at which a node driver (byokd node) passes a mount that it has made, so that byokd needs no
	// privilege. Absolute path. mount is then only shown, as the place where the workload sees the files.
	MountSocket string `yaml:"mountSocket"`
	// Whether an empty lower directory is made a new volume. auto: it is. never: it is refused, which once
	// there is a volume tells a disk that is not mounted from one that is new.
	Create string `yaml:"create"`
	// Which of the keys protects the volume. The volume remembers the key's ARN: another one takes a move
	// (byokd key rewrap). May be left out when there is one key only.
	Key string `yaml:"key"`
	// Kernel caching of writes: writeback (fast; what was fsynced is safe) or writethrough (each write
	// is sealed before it returns).
	Cache string `yaml:"cache"`
	// The most that the kernel may hold dirty of the mount, from 1MiB to 1GiB: what a freeze has to flush
	// within half a second. More of it makes bursts of writes faster; on a slow disk, less of it keeps the
	// freeze prompt. Four times as much is set aside below for a full disk.
	DirtyLimit Size `yaml:"dirtyLimit"`
	// on: byokd is two processes, a keeper that holds the mount and a worker that serves it and is started
	// again when it is killed, runs out of memory or is replaced (byokd upgrade): callers wait for some
	// milliseconds and none fails. off: the mount ends with byokd. auto: on where the lower filesystem is
	// ext4, or XFS mounted with inode32, and byokd has CAP_DAC_READ_SEARCH. Elsewhere each inode that the kernel
	// knows would take a descriptor of both processes, and running out of them makes calls fail: so it is on
	// there only if asked for. auto is off with mountSocket, too, where who has mounted holds the mount.
	Keeper string `yaml:"keeper"`
	// Where a volume keeps owner, group and mode of its files, which is settled when it is made. sealed: in
	// an attribute of lower files that are all byokd's own, so that byokd needs no privilege. lower: on the
	// lower files, for which byokd needs CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER. auto: a new volume gets
	// sealed with mountSocket or without those capabilities, else lower; one that exists is taken as it is.
	Ownership string `yaml:"ownership"`
}

// ObjectsConfig is the encrypting S3 proxy.
type ObjectsConfig struct {
	// Address and port of the S3 endpoint that the pod's own clients use.
	Listen string `yaml:"listen"`
	// Allows an address of `listen` that other machines can reach. Plain text travels on it, so the
	// network between must be trusted unless tls is given.
	AllowRemote bool `yaml:"allowRemote"`
	// Serves TLS. Left out, the endpoint is plain http: enough on loopback.
	TLS *TLSConfig `yaml:"tls"`
	// Names below which buckets are addressed by host: with s3.internal, documents.s3.internal is the
	// bucket documents. Buckets can always be addressed by path.
	Domains []string `yaml:"domains"`
	// What clients of the proxy sign their requests with. Required.
	Credentials CredentialsConfig `yaml:"credentials"`
	// How long a request is held while frozen before it is answered 503 SlowDown with Retry-After, from
	// 0s to 5m. Clients give up after 30s (Java) to 60s (boto3): stay below.
	HoldFor Duration `yaml:"holdFor"`
	// How long a request waits for its client while fewer than 64 KiB move, from 10s to 1h. Then an upload
	// is answered RequestTimeout and a download is broken off. While frozen this time does not run.
	StallTimeout Duration `yaml:"stallTimeout"`
	// The buckets, under the names that clients use. Required.
	Buckets map[string]BucketConfig `yaml:"buckets"`
}

// TLSConfig is the certificate of the S3 endpoint.
type TLSConfig struct {
	// A PEM file with the certificate and those between it and its authority. It and the key are read
	// again when they change. Required.
	Certificate string `yaml:"certificate"`
	// A PEM file with its private key. Required.
	Key string `yaml:"key"`
}

// CredentialsConfig says where the S3 credentials of the proxy's clients are.
type CredentialsConfig struct {
	// A file with one ACCESS_KEY_ID:SECRET_ACCESS_KEY per line; lines that begin with # are comments.
	// Refused when everybody may read it (chmod 600). Required.
	File string `yaml:"file"`
}

// BucketConfig is one bucket of the proxy.
type BucketConfig struct {
	// Where the sealed objects are kept.
	Upstream UpstreamConfig `yaml:"upstream"`
	// For a copy of a bucket (S3 replication into another region): the name of the bucket that its objects
	// were sealed in, which is part of their encryption context. Left out, upstream.bucket.
	SealedAs string `yaml:"sealedAs"`
	// Which of the keys protects the bucket. May be left out when there is one key only.
	Key string `yaml:"key"`
	// What the bucket holds: documents, backups or another short name, shown on the status page. Left
	// out, the bucket's name.
	Role string `yaml:"role"`
	// What becomes of user metadata (x-amz-meta-*: names of documents, say): sealed, in one entry that
	// leaves about 1.3 KB of names and values, or clear, readable upstream and up to S3's 2 KB. Objects
	// keep what they were written with.
	Metadata string `yaml:"metadata"`
	// Compression of objects that are put in one request: none, or zstd, each 64 KiB on its own. What is
	// in the bucket stays as it is, and stays readable when this is changed back. The price: every
	// listing asks the upstream for the length of each object it has not listed before (one HEAD each,
	// sixteen at once), ranges read an object from its part's beginning, an upload waits until 6 MiB of
	// it are packed. Parts of multipart uploads are not compressed. Sizes seen upstream tell how well
	// the content compresses.
	Compression string `yaml:"compression"`
}

// UpstreamConfig is one bucket below the proxy.
type UpstreamConfig struct {
	// Name of the upstream bucket. Required.
	Bucket string `yaml:"bucket"`
	// Its region. Left out, cluster.region, else the region of the bucket's key.
	Region string `yaml:"region"`
	// Address of S3, for a store other than AWS. Buckets are then addressed by path. Left out, the SDK's.
	Endpoint string `yaml:"endpoint"`
	// Whether uploads carry a checksum of the sealed bytes: send, as AWS demands for buckets with a default
	// retention (Object Lock), or omit. It follows the bytes (a CRC32 in a trailer), for which the endpoint
	// has to be https and the store has to know trailers. Left out, send for AWS, omit for other stores.
	Checksums string `yaml:"checksums"`
}

// AdminConfig is the listener for people and monitoring.
type AdminConfig struct {
	// Address and port of the admin listener.
	Listen string `yaml:"listen"`
	// Allows an address of `listen` that other machines can reach, as Prometheus and kubelet need. No key
	// material, object names or file names are ever shown there, key ARNs and states are.
	AllowRemote bool `yaml:"allowRemote"`
	// Names under which browsers may ask for the panel besides localhost and plain IP addresses; others
	// are refused, so that a web page cannot reach it by rebinding a name.
	Hosts []string `yaml:"hosts"`
	// A unix socket for `byokd freeze`, `byokd thaw` and `byokd key rewrap`, mode 0600, for root and the user
	// that byokd runs as. Its directory must exist. Absolute path. Left out, there is none and these
	// commands cannot reach a running byokd.
	Socket string `yaml:"socket"`
	// Keeps /readyz at 200 while frozen, for workloads whose peers must go on finding a frozen one by a name
	// that only ready pods have. Everything else tells the freeze as ever.
	ReadyWhileFrozen bool `yaml:"readyWhileFrozen"`
}

// AuditConfig is the audit trail.
type AuditConfig struct {
	// A file that gets one line of JSON for each unwrap, refusal, freeze and thaw, with the KMS request
	// id that also stands in CloudTrail; docs/AUDIT.md has the schema. Appended to, mode 0600. Left out,
	// the lines go to the log.
	File string `yaml:"file"`
	// The size at which a new file is begun, from 1MiB to 16GiB. Ten full ones are kept as FILE.1, the
	// youngest, to FILE.10.
	MaxSize Size `yaml:"maxSize"`
}

// FleetConfig is how byokd processes that watch the same keys help each other: who sees a refusal hints the
// others, who then ask KMS themselves, and their probes are spread over the interval.
type FleetConfig struct {
	// Names of all members with the port at which they listen: one is enough where it has everybody's
	// address, as that of a headless service has. Required.
	Peers []string `yaml:"peers"`
	// UDP address and port at which hints are heard. Hints are authenticated and never answered.
	Listen string `yaml:"listen"`
	// A file with the secret that the members share, 32 characters or more. Refused when everybody may
	// read it (chmod 600). Required.
	SecretFile string `yaml:"secretFile"`
}

// LogConfig is the log.
type LogConfig struct {
	// debug, info, warn or error.
	Level string `yaml:"level"`
	// json for machines or console for people.
	Format string `yaml:"format"`
}

// Defaults. The probe interval and the grace are promises of docs/ARCHITECTURE.md: a refusal is acted on
// within 1s + 1s, an outage of a minute is ridden out. stopTimeout stays under Kubernetes' 30s with 5s to
// spare for the container runtime. holdFor stays under the shortest client timeout known (30s, Java).
const (
	defaultProbeInterval = time.Second
	defaultOutageGrace   = 60 * time.Second
	defaultStopTimeout   = 25 * time.Second
	defaultAuditSize     = 64 << 20
	defaultFleetListen   = ":9182"
	defaultHoldFor       = 20 * time.Second
	defaultStallTimeout  = 2 * time.Minute
	defaultObjectsListen = "127.0.0.1:9000"
	defaultAdminListen   = "127.0.0.1:9180"
	defaultSocket        = "/run/byokd/control.sock" // where the commands look; byokd run makes it only when told
)

// withDefaults returns c with everything filled in that was left out.
func (c Config) withDefaults() Config {
	only := ""
	keys := make(map[string]KeyConfig, len(c.Keys))
	for name, k := range c.Keys {
		k.ProbeInterval.setDefault(defaultProbeInterval)
		k.OutageGrace.setDefault(defaultOutageGrace)
		keys[name] = k
		only = name
	}
	if len(keys) != 1 {
		only = ""
	}
	c.Keys = keys
	if c.Volume != nil {
		v := *c.Volume
		setDefault(&v.Role, "orchestration")
		setDefault(&v.Create, createAuto)
		setDefault(&v.Key, only)
		setDefault(&v.Cache, cacheWriteback)
		setDefault(&v.Keeper, keeperAuto)
		setDefault(&v.Ownership, ownershipAuto)
		v.DirtyLimit.setDefault(fs.DefaultDirtyLimit)
		c.Volume = &v
	}
	if c.Objects != nil {
		o := *c.Objects
		setDefault(&o.Listen, defaultObjectsListen)
		o.HoldFor.setDefault(defaultHoldFor)
		o.StallTimeout.setDefault(defaultStallTimeout)
		buckets := make(map[string]BucketConfig, len(o.Buckets))
		for name, b := range o.Buckets {
			setDefault(&b.Key, only)
			setDefault(&b.Role, name)
			setDefault(&b.Metadata, metadataSealed)
			setDefault(&b.Compression, compressionNone)
			setDefault(&b.Upstream.Region, c.Cluster.Region)
			setDefault(&b.Upstream.Region, regionOfARN(c.Keys[b.Key].ARN))
			setDefault(&b.Upstream.Checksums, checksumsFor(b.Upstream.Endpoint))
			buckets[name] = b
		}
		o.Buckets = buckets
		c.Objects = &o
	}
	setDefault(&c.Admin.Listen, defaultAdminListen)
	setDefault(&c.Log.Level, "info")
	setDefault(&c.Log.Format, "json")
	if c.Fleet != nil {
		f := *c.Fleet
		setDefault(&f.Listen, defaultFleetListen)
		c.Fleet = &f
	}
	c.Audit.MaxSize.setDefault(defaultAuditSize)
	c.StopTimeout.setDefault(defaultStopTimeout)
	return c
}

const (
	cacheWriteback    = "writeback"
	cacheWritethrough = "writethrough"

	ownershipAuto   = "auto"
	ownershipLower  = "lower"
	ownershipSealed = "sealed"

	createAuto      = "auto"
	createNever     = "never"
	keeperAuto      = "auto"
	keeperOff       = "off"
	keeperOn        = "on"
	metadataSealed  = "sealed"
	metadataClear   = "clear"
	compressionNone = "none"
	checksumsSend   = "send"
	checksumsOmit   = "omit"
	compressionZstd = "zstd"
)

func setDefault(field *string, value string) {
	if *field == "" {
		*field = value
	}
}
