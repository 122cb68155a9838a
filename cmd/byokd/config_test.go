package main

import (
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/byokd/byokd/fs"
)

var update = flag.Bool("update", false, "rewrite the golden files of this package")

const goodConfig = `
cluster: {id: acme-prod, region: eu-central-1}
keys:
  primary: {arn: "arn:aws:kms:eu-central-1:111122223333:key/11111111-2222-3333-4444-555555555555", probeInterval: 500ms, outageGrace: 5s}
  backup:  {arn: "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234"}
volume: {role: orchestration, lower: /sealed, mount: /data, key: primary}
objects:
  credentials: {file: /etc/byokd/s3-credentials}
  buckets:
    documents: {upstream: {bucket: acme-documents}, key: primary}
    backups:   {upstream: {bucket: acme-backups, region: eu-west-1}, key: backup, role: archive}
`

func TestConfigCompletesWhatIsLeftOut(t *testing.T) {
	c, warnings, err := parseConfig("byokd.yaml", []byte(goodConfig), []string{"PATH=/bin"})
	if err != nil || len(warnings) != 0 {
		t.Fatalf("%v, %v", err, warnings)
	}
	if got := c.Keys["primary"]; got.ProbeInterval.Duration != 500*time.Millisecond || got.OutageGrace.Duration != 5*time.Second {
		t.Errorf("primary: %+v: what was given must stay", got)
	}
	if got := c.Keys["backup"]; got.ProbeInterval.Duration != time.Second || got.OutageGrace.Duration != time.Minute {
		t.Errorf("backup: %+v", got)
	}
	documents, backups := c.Objects.Buckets["documents"], c.Objects.Buckets["backups"]
	if documents.Upstream.Region != "eu-central-1" || documents.Role != "documents" || backups.Role != "archive" {
		t.Errorf("buckets: %+v %+v", documents, backups)
	}
	if c.Objects.Listen != "127.0.0.1:9000" || c.Admin.Listen != "127.0.0.1:9180" || c.Volume.Cache != "writeback" {
		t.Errorf("%+v %+v", c.Objects, c.Admin)
	}
}

// Port 0 is any free port, so that two of them are not the same.
func TestConfigTakesAnyPortTwice(t *testing.T) {
	text := strings.Replace(goodConfig, "objects:\n", "admin: {listen: \"127.0.0.1:0\"}\nobjects:\n  listen: 127.0.0.1:0\n", 1)
	if _, _, err := parseConfig("byokd.yaml", []byte(text), nil); err != nil {
		t.Error(err)
	}
}

// Each row spoils the good configuration in one or more places and expects every fault told, with its line.
func TestConfigTellsEveryFault(t *testing.T) {
	const head = "cluster: {id: a}\nkeys:\n  k: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/1\"}\n"
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"unknown fields, all at once", head + "volumes: {}\nvolume:\n  lower: /s\n  mout: /d\n  mount: /m\n",
			[]string{"f:4: volumes: unknown field; did you mean volume?", "f:7: volume.mout: unknown field; did you mean mount?"}},
		{"nothing near", head + "zzzzzz: 1\n", []string{"f:4: zzzzzz: unknown field; known here: admin, audit, cluster"}},
		{"duration without unit", head + "stopTimeout: 30\n", []string{`f:4: stopTimeout: "30" is not a length of time: write a number and a unit`}},
		{"not a bool", head + "admin: {allowRemote: yes}\n", []string{`f:4: admin.allowRemote: "yes" is neither true nor false`}},
		{"a list for a field", head + "admin: {listen: [a]}\n", []string{"f:4: admin.listen: a list is not expected here"}},
		{"a field for a list", head + "admin: {hosts: a}\n", []string{"f:4: admin.hosts: a list is expected"}},
		{"a scalar for a section", head + "volume: /data\n", []string{`f:4: volume: fields are expected below it, not "/data"`}},
		{"fields for a scalar", head + "volume: {lower: {a: b}}\n", []string{"f:4: volume.lower: a single value is expected"}},
		{"aliases", head + "volume: &v {lower: /s}\nobjects: *v\n", []string{"f:4: volume: anchors", "f:5: objects: anchors"}},
		{"duplicates", head + "log: {level: info}\nlog: {level: debug}\n", []string{"f:5: not YAML: mapping key \"log\" already defined"}},
		{"broken YAML", "cluster: [\n", []string{"f:1: not YAML: "}},
		{"two documents", head + "---\ncluster: {id: b}\n", []string{"a second document"}},
		{"empty", "# nothing\n", []string{"f: cluster.id: missing", "f: keys: missing", "f: volume: missing, and objects as well"}},
		{"alias of a key", "cluster: {id: a}\nkeys: {k: {arn: \"arn:aws:kms:eu-central-1:111122223333:alias/x\"}}\nvolume: {lower: /s, mount: /m}\n",
			[]string{"f:2: keys.k.arn:", "is an alias", "aws kms describe-key --key-id arn:aws:kms:eu-central-1:111122223333:alias/x"}},
		{"no ARN, too slow a probe", "cluster: {id: a}\nkeys: {k: {arn: 1234, probeInterval: 2m}}\nvolume: {lower: /s, mount: /m}\n",
			[]string{`f:2: keys.k.arn: "1234" is not the ARN of a KMS key`, "keys.k.probeInterval: 2m0s is not between 100ms and 1m0s"}},
		{"an explicit zero is not the default", head + "volume: {lower: /s, mount: /m}\nstopTimeout: 0s\n", []string{"f:5: stopTimeout: 0s is not between 1s and 1h0m0s"}},
		{"no grace", "cluster: {id: a}\nkeys: {k: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/1\", outageGrace: 1s}}\nvolume: {lower: /s, mount: /m}\n",
			[]string{"f:2: keys.k.outageGrace: 1s is not between 3s and 24h0m0s"}},
		{"one key twice", head + "  j: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/1\"}\nvolume: {lower: /s, mount: /m, key: k}\n",
			[]string{"f:3: keys.k.arn: the same key as keys.j"}},
		{"unknown key name", head + "volume: {lower: /s, mount: /m, key: z}\n", []string{`f:4: volume.key: there is no key called "z" under keys (k)`}},
		{"which key", head + "  j: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/2\"}\nvolume: {lower: /s, mount: /m}\n",
			[]string{"f:5: volume.key: missing: which of the keys (j, k)?"}},
		{"region", head + "volume: {lower: /s, mount: /m}\n", nil},
		{"wrong region", "cluster: {id: a, region: us-east-1}\nkeys:\n  k: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/1\"}\nvolume: {lower: /s, mount: /m}\n",
			[]string{"the key k is in eu-central-1, the cluster in us-east-1"}},
		{"paths", head + "volume: {lower: s, mount: /, cache: none, role: A}\n",
			[]string{`volume.lower: must be an absolute path, not "s"`, "volume.mount: cannot be /", `volume.cache: "none" is none of writeback, writethrough`, "volume.role"}},
		{"one in the other", head + "volume: {lower: /data/sealed, mount: /data}\n", []string{"volume.mount: /data and volume.lower /data/sealed are the same or one inside the other"}},
		{"remote listener", head + "volume: {lower: /s, mount: /m}\nadmin: {listen: \"0.0.0.0:9180\"}\n", []string{`f:5: admin.listen: "0.0.0.0:9180" can be reached from other machines; say allowRemote: true in admin`}},
		{"remote listener, any address", head + "volume: {lower: /s, mount: /m}\nadmin: {listen: \":9180\"}\n", []string{"f:5: admin.listen"}},
		{"listener", head + "volume: {lower: /s, mount: /m}\nadmin: {listen: here}\n", []string{`"here" is not ADDRESS:PORT`}},
		{"buckets", head + "objects: {credentials: {file: c}, holdFor: 1h, stallTimeout: 1s, buckets: {B: {upstream: {bucket: u}}, doc: {upstream: {bucket: u}}, eve: {}}}\n",
			[]string{`objects.credentials.file: must be an absolute path`, "objects.holdFor", "objects.stallTimeout: 1s is not between 10s and 1h", "objects.buckets.B: not a name", "objects.buckets.doc.upstream: the same upstream bucket as that of B", "objects.buckets.eve.upstream.bucket: missing"}},
		{"checksums", head + "objects: {credentials: {file: /c}, buckets: {doc: {upstream: {bucket: u, endpoint: \"http://minio:9000\", checksums: send}}, doz: {upstream: {bucket: v, checksums: md5}}}}\n",
			[]string{"objects.buckets.doc.upstream.checksums: checksums follow the bytes they are of, which needs https", `objects.buckets.doz.upstream.checksums: "md5" is none of send, omit`}},
		{"plain http to KMS", "cluster: {id: a}\nkeys: {k: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/1\", endpoint: \"http://kms.example.com\"}}\nvolume: {lower: /s, mount: /m}\n",
			[]string{"keys.k.endpoint", "plain http is for this machine only"}},
		{"one port twice", head + "objects: {listen: \"127.0.0.1:9180\", credentials: {file: /c}, buckets: {doc: {upstream: {bucket: u}}}}\n", []string{"objects.listen: the same as admin.listen"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := parseConfig("f", []byte(c.text), nil)
			if c.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var faults *configError
			if !errors.As(err, &faults) {
				t.Fatalf("got %v, want a configError", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("missing %q in:\n%v", want, err)
				}
			}
		})
	}
}

func TestEnvironmentOverridesTheFile(t *testing.T) {
	c, warnings, err := parseConfig("f", []byte(goodConfig), []string{
		"BYOKD_KEYS_PRIMARY_PROBE_INTERVAL=2s", "BYOKD_ADMIN_LISTEN=127.0.0.1:1", "BYOKD_ADMIN_HOSTS=a.example, b.example",
		"BYOKD_OBJECTS_BUCKETS_DOCUMENTS_UPSTREAM_BUCKET=other", "BYOKD_SERVICE_HOST=10.0.0.1", "BYOKD_PORT_9180_TCP=x", "BYOKD_LOG_LEVL=debug",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Keys["primary"].ProbeInterval.Duration != 2*time.Second || c.Admin.Listen != "127.0.0.1:1" ||
		c.Objects.Buckets["documents"].Upstream.Bucket != "other" || !reflect.DeepEqual(c.Admin.Hosts, []string{"a.example", "b.example"}) {
		t.Errorf("not overridden: %+v", c)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "BYOKD_LOG_LEVL") {
		t.Errorf("warnings: %q, want one, about BYOKD_LOG_LEVL", warnings)
	}
	_, _, err = parseConfig("f", []byte(goodConfig), []string{"BYOKD_STOP_TIMEOUT=soon"})
	if err == nil || !strings.Contains(err.Error(), "environment variable BYOKD_STOP_TIMEOUT: \"soon\" is not a length of time") {
		t.Errorf("got %v", err)
	}
}

func TestEnvironmentCanAddASection(t *testing.T) {
	text := "cluster: {id: a}\nkeys: {k: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/1\"}}\n"
	c, _, err := parseConfig("f", []byte(text), []string{"BYOKD_VOLUME_LOWER=/s", "BYOKD_VOLUME_MOUNT=/m"})
	if err != nil || c.Volume == nil || c.Volume.Lower != "/s" || c.Volume.Key != "k" || c.Objects != nil {
		t.Errorf("%+v, %v", c, err)
	}
}

// The reference is rendered from the doc comments of config.go, so the two cannot say different things.
func TestReferenceIsTheDocComments(t *testing.T) {
	want := renderReference(t)
	if *update {
		if err := os.WriteFile("reference.yaml", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if !*update && want != configReference {
		t.Fatal("reference.yaml is not what config.go says; run: go test ./cmd/byokd -run TestReference -update")
	}
	if _, _, err := parseConfig("reference.yaml", []byte(configReference), nil); err != nil {
		t.Errorf("the reference itself is refused:\n%v", err)
	}
}

// What the reference shows for each field; a field without an entry fails the test.
var referenceValues = map[string]string{
	"cluster.id": "acme-prod", "cluster.region": "eu-central-1", "cluster.tenant": `""`,
	"keys.primary.arn":           `"arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"`,
	"keys.primary.probeInterval": "1s", "keys.primary.outageGrace": "60s", "keys.primary.endpoint": `""`, "keys.primary.stretchTo": "0s",
	"fleet.peers": `["byokd-fleet.acme.svc:9182"]`, "fleet.listen": `":9182"`, "fleet.secretFile": "/etc/byokd/fleet-secret",
	"volume.role": "orchestration", "volume.lower": "/sealed", "volume.mount": "/data", "volume.mountSocket": `""`, "volume.key": "primary", "volume.create": "auto", "volume.cache": "writeback", "volume.dirtyLimit": "32MiB", "volume.keeper": "auto", "volume.ownership": "auto",
	"objects.listen": "127.0.0.1:9000", "objects.allowRemote": "false", "objects.tls.certificate": "/etc/byokd/tls/tls.crt", "objects.tls.key": "/etc/byokd/tls/tls.key", "objects.domains": "[]",
	"objects.credentials.file": "/etc/byokd/s3-credentials",
	"objects.holdFor":          "20s", "objects.stallTimeout": "2m", "objects.buckets.documents.upstream.bucket": "acme-documents",
	"objects.buckets.documents.upstream.region": "eu-central-1", "objects.buckets.documents.upstream.endpoint": `""`, "objects.buckets.documents.upstream.checksums": "send",
	"objects.buckets.documents.key": "primary", "objects.buckets.documents.sealedAs": `""`, "objects.buckets.documents.role": "documents", "objects.buckets.documents.metadata": "sealed", "objects.buckets.documents.compression": "none",
	"admin.listen": "127.0.0.1:9180", "admin.allowRemote": "false",
	"admin.readyWhileFrozen": "false", "admin.hosts": "[]", "admin.socket": "/run/byokd/control.sock",
	"audit.file": "/var/log/byokd/audit.jsonl", "audit.maxSize": "64MiB", "log.level": "info", "log.format": "json", "stopTimeout": "25s",
}

func renderReference(t *testing.T) string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	docs := map[string]string{} // Type.Field → comment
	ast.Inspect(parsed, func(n ast.Node) bool {
		if spec, ok := n.(*ast.TypeSpec); ok {
			for _, f := range spec.Type.(*ast.StructType).Fields.List {
				docs[spec.Name.Name+"."+f.Names[0].Name] = f.Doc.Text()
			}
		}
		return true
	})
	var b strings.Builder
	b.WriteString("# The whole configuration of byokd, with its defaults or an example for each field.\n" +
		"# Any of them can be overridden from the environment: BYOKD_ADMIN_LISTEN for admin.listen.\n")
	var walk func(typ reflect.Type, path, indent string)
	walk = func(typ reflect.Type, path, indent string) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name := f.Tag.Get("yaml")
			at := join(path, name)
			doc := docs[typ.Name()+"."+f.Name]
			if doc == "" {
				t.Errorf("%s.%s has no doc comment", typ.Name(), f.Name)
			}
			if indent == "" {
				b.WriteByte('\n')
			}
			for line := range strings.Lines(doc) {
				b.WriteString(indent + "# " + line)
			}
			inner := f.Type
			for inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			switch {
			case inner.Kind() == reflect.Map:
				example := map[string]string{"keys": "primary", "objects.buckets": "documents"}[at]
				fmt.Fprintf(&b, "%s%s:\n%s  %s:\n", indent, name, indent, example)
				walk(inner.Elem(), join(at, example), indent+"    ")
			case inner.Kind() == reflect.Struct && inner != reflect.TypeFor[Duration]() && inner != reflect.TypeFor[Size]():
				fmt.Fprintf(&b, "%s%s:\n", indent, name)
				walk(inner, at, indent+"  ")
			default:
				value, ok := referenceValues[at]
				if !ok {
					t.Errorf("referenceValues has no example for %s", at)
				}
				fmt.Fprintf(&b, "%s%s: %s\n", indent, name, value)
			}
		}
	}
	walk(reflect.TypeFor[Config](), "", "")
	return b.String()
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(goodConfig))
	f.Add([]byte("keys: &a {b: *a}\n? - x\n: |\n  y\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, _, err := parseConfig("f", text, nil); err == nil && !strings.Contains(string(text), "arn:") {
			t.Error("accepted without a key")
		}
	})
}

func TestMountedAt(t *testing.T) {
	const mountinfo = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:40 / /data rw,nosuid shared:9 - fuse.byokd byokd rw
41 22 0:41 / /with\040space rw - tmpfs none rw
42 40 0:42 / /data rw - tmpfs none rw
`
	for dir, want := range map[string]string{"/": "ext4", "/data": "tmpfs", "/with space": "tmpfs", "/dat": "", "/data/x": ""} {
		if got := mountedAt(mountinfo, dir); got != want {
			t.Errorf("%s: %q, want %q", dir, got, want)
		}
	}
}

func TestParseCredentials(t *testing.T) {
	got, err := parseCredentials("# comment\n\nid:se:cret\n other:x \n")
	if want := map[string]string{"id": "se:cret", "other": "x"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "# only a comment", "id", ":secret", "id:", "id:a\nid:b", "i d:secret"} {
		if got, err := parseCredentials(bad); err == nil {
			t.Errorf("%q: accepted as %v", bad, got)
		}
	}
}

// TestKept: a keeper is there where it is asked for, or needs no descriptor of each inode.
func TestKept(t *testing.T) {
	here := t.TempDir()
	byHandle := fs.OpensByHandle(here)
	for _, c := range []struct {
		volume *VolumeConfig
		want   bool
	}{
		{nil, false},
		{&VolumeConfig{Keeper: keeperOff, Lower: here}, false},
		{&VolumeConfig{Keeper: keeperOn, Lower: "/proc"}, true},
		{&VolumeConfig{Keeper: keeperAuto, Lower: here}, byHandle},
		{&VolumeConfig{Keeper: keeperAuto, Lower: here + "/to/be/made"}, byHandle},
		{&VolumeConfig{Keeper: keeperAuto, Lower: "/proc"}, false},
		{&VolumeConfig{Keeper: keeperAuto, Lower: here, MountSocket: "/socket"}, false},
	} {
		if got := c.volume.kept(); got != c.want {
			t.Errorf("%+v: %v", c.volume, got)
		}
	}
}
