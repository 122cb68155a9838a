package main

import (
	"fmt"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

var (
	keyARN = regexp.MustCompile(`^arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:key/[A-Za-z0-9-]+$`)
	// Names end up in metrics labels, variables and URLs.
	shortName  = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
)

// regionOfARN returns the region in a key ARN, or nothing.
func regionOfARN(arn string) string {
	if m := keyARN.FindStringSubmatch(arn); m != nil {
		return m[1]
	}
	return ""
}

// checker collects the faults of a configuration whose text was sound.
type checker struct{ problems []problem }

func (c *checker) fail(path, format string, args ...any) {
	c.problems = append(c.problems, problem{path: path, text: fmt.Sprintf(format, args...)})
}

func (c *checker) required(path, value, what string) bool {
	if value == "" {
		c.fail(path, "missing: %s", what)
	}
	return value != ""
}

// validate returns everything that is wrong with a completed configuration, in a stable order. It looks
// at no file and no network: what it accepts is well-formed, not necessarily there.
func (c Config) validate() []problem {
	var v checker
	if v.required("cluster.id", c.Cluster.ID, "a name for the cluster, such as acme-prod") && len(c.Cluster.ID) > 128 {
		v.fail("cluster.id", "longer than 128 characters")
	}
	if len(c.Cluster.Tenant) > 128 {
		v.fail("cluster.tenant", "longer than 128 characters")
	}
	v.keys(c)
	if c.Volume == nil && c.Objects == nil {
		v.fail("volume", "missing, and objects as well: there is nothing to protect")
	}
	if c.Volume != nil {
		v.volume(c)
	}
	if c.Objects != nil {
		v.objects(c)
	}
	v.listen("admin", c.Admin.Listen, c.Admin.AllowRemote)
	if c.Admin.Socket != "" && !filepath.IsAbs(c.Admin.Socket) {
		v.fail("admin.socket", "must be an absolute path, not %q", c.Admin.Socket)
	}
	if c.Objects != nil && c.Objects.Listen == c.Admin.Listen && !strings.HasSuffix(c.Admin.Listen, ":0") {
		v.fail("objects.listen", "the same as admin.listen (%s)", c.Admin.Listen)
	}
	if c.Fleet != nil {
		v.fleet(*c.Fleet)
	}
	if c.Audit.File != "" && !filepath.IsAbs(c.Audit.File) {
		v.fail("audit.file", "must be an absolute path, not %q", c.Audit.File)
	}
	if c.Audit.MaxSize.Bytes < 1<<20 || c.Audit.MaxSize.Bytes > 16<<30 {
		v.fail("audit.maxSize", "must be between 1MiB and 16GiB")
	}
	v.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", c.Log.Format, "json", "console")
	v.within("stopTimeout", c.StopTimeout, time.Second, time.Hour)
	return v.problems
}

func (c *checker) keys(cfg Config) {
	if len(cfg.Keys) == 0 {
		c.fail("keys", "missing: at least one KMS key, such as\n    keys:\n      primary: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/…\"}")
	}
	byARN := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(cfg.Keys)) {
		k, path := cfg.Keys[name], "keys."+name
		if !shortName.MatchString(name) {
			c.fail(path, "a name has lower-case letters, digits and dashes only, at most 63")
		}
		switch {
		case !c.required(path+".arn", k.ARN, "the ARN of the KMS key"):
		case strings.Contains(k.ARN, ":alias/"):
			c.fail(path+".arn", "%q is an alias; give the ARN of the key itself (aws kms describe-key --key-id %s --query KeyMetadata.Arn): an alias could be pointed at another key", k.ARN, k.ARN)
		case !keyARN.MatchString(k.ARN):
			c.fail(path+".arn", "%q is not the ARN of a KMS key, arn:aws:kms:REGION:ACCOUNT:key/ID", k.ARN)
		case byARN[k.ARN] != "":
			c.fail(path+".arn", "the same key as keys.%s: name each key once and refer to it from several places", byARN[k.ARN])
		}
		byARN[k.ARN] = name
		c.within(path+".probeInterval", k.ProbeInterval, 100*time.Millisecond, time.Minute)
		// A probe that is missed costs its interval, its timeout and a repetition: less grace than that
		// would freeze at the first lost packet.
		c.within(path+".outageGrace", k.OutageGrace, k.ProbeInterval.Duration+2*time.Second, 24*time.Hour)
		if k.StretchTo.Duration != 0 {
			c.within(path+".stretchTo", k.StretchTo, k.ProbeInterval.Duration, k.OutageGrace.Duration-2*time.Second)
			if cfg.Fleet == nil {
				c.fail(path+".stretchTo", "there is no fleet whose hints would make up for it; add the section fleet")
			}
		}
		c.endpoint(path+".endpoint", k.Endpoint, false)
	}
}

func (c *checker) fleet(f FleetConfig) {
	if len(f.Peers) == 0 {
		c.fail("fleet.peers", "missing: the names of the members with their port, such as byokd-fleet.acme.svc:9182")
	}
	for _, peer := range append([]string{f.Listen}, f.Peers...) {
		if _, _, err := net.SplitHostPort(peer); err != nil {
			c.fail("fleet", "%q is not name:port", peer)
		}
	}
	c.file("fleet.secretFile", f.SecretFile, "a file with the secret that the members share")
}

func (c *checker) volume(cfg Config) {
	v := cfg.Volume
	if !shortName.MatchString(v.Role) {
		c.fail("volume.role", "%q: lower-case letters, digits and dashes only, at most 63", v.Role)
	}
	lower := c.directory("volume.lower", v.Lower, "the directory for the sealed files")
	mount := false
	if v.MountSocket == "" {
		mount = c.directory("volume.mount", v.Mount, "the directory at which the plain files appear")
	} else {
		c.file("volume.mountSocket", v.MountSocket, "the socket of the node driver")
	}
	if lower && mount && (within(v.Lower, v.Mount) || within(v.Mount, v.Lower)) {
		c.fail("volume.mount", "%s and volume.lower %s are the same or one inside the other", v.Mount, v.Lower)
	}
	c.oneOf("volume.create", v.Create, createAuto, createNever)
	c.oneOf("volume.cache", v.Cache, cacheWriteback, cacheWritethrough)
	c.oneOf("volume.keeper", v.Keeper, keeperAuto, keeperOff, keeperOn)
	c.oneOf("volume.ownership", v.Ownership, ownershipAuto, ownershipLower, ownershipSealed)
	if v.DirtyLimit.Bytes < 1<<20 || v.DirtyLimit.Bytes > 1<<30 {
		c.fail("volume.dirtyLimit", "must be between 1MiB and 1GiB")
	}
	c.keyRef("volume.key", v.Key, cfg)
	region := regionOfARN(cfg.Keys[v.Key].ARN)
	if cfg.Cluster.Region != "" && region != "" && region != cfg.Cluster.Region {
		c.fail("volume.key", "the key %s is in %s, the cluster in %s: the volume's key must be in the cluster's region", v.Key, region, cfg.Cluster.Region)
	}
}

// file demands the absolute path of a file.
func (c *checker) file(field, path, what string) {
	if c.required(field, path, what) && !filepath.IsAbs(path) {
		c.fail(field, "must be an absolute path, not %q", path)
	}
}

func (c *checker) objects(cfg Config) {
	o := cfg.Objects
	c.listen("objects", o.Listen, o.AllowRemote)
	c.file("objects.credentials.file", o.Credentials.File, "a file with ACCESS_KEY_ID:SECRET_ACCESS_KEY lines for the clients of the proxy")
	c.within("objects.holdFor", o.HoldFor, 0, 5*time.Minute)
	c.within("objects.stallTimeout", o.StallTimeout, 10*time.Second, time.Hour)
	if o.TLS != nil {
		c.file("objects.tls.certificate", o.TLS.Certificate, "a PEM file with the certificate")
		c.file("objects.tls.key", o.TLS.Key, "a PEM file with the private key")
	}
	for _, domain := range o.Domains {
		if domain == "" || strings.ContainsAny(domain, ":/ ") || strings.HasPrefix(domain, ".") {
			c.fail("objects.domains", "must hold plain host names, not %q", domain)
		}
	}
	if len(o.Buckets) == 0 {
		c.fail("objects.buckets", "missing: at least one bucket")
	}
	above := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(o.Buckets)) {
		b, path := o.Buckets[name], "objects.buckets."+name
		if !bucketName.MatchString(name) {
			c.fail(path, "not a name for a bucket: 3 to 63 lower-case letters, digits, dots and dashes")
		}
		if !shortName.MatchString(b.Role) {
			c.fail(path+".role", "%q: lower-case letters, digits and dashes only, at most 63", b.Role)
		}
		c.keyRef(path+".key", b.Key, cfg)
		c.oneOf(path+".metadata", b.Metadata, metadataSealed, metadataClear)
		c.oneOf(path+".compression", b.Compression, compressionNone, compressionZstd)
		c.endpoint(path+".upstream.endpoint", b.Upstream.Endpoint, true)
		c.oneOf(path+".upstream.checksums", b.Upstream.Checksums, checksumsSend, checksumsOmit)
		if b.Upstream.Checksums == checksumsSend && strings.HasPrefix(b.Upstream.Endpoint, "http://") {
			c.fail(path+".upstream.checksums", "checksums follow the bytes they are of, which needs https; the endpoint is %s", b.Upstream.Endpoint)
		}
		if !c.required(path+".upstream.bucket", b.Upstream.Bucket, "the name of the upstream bucket") {
			continue
		}
		at := b.Upstream.Endpoint + "/" + b.Upstream.Region + "/" + b.Upstream.Bucket
		if other := above[at]; other != "" {
			c.fail(path+".upstream", "the same upstream bucket as that of %s: objects of one would show up in the other", other)
		}
		above[at] = name
		if b.Upstream.Region == "" {
			c.required(path+".upstream.region", "", "the region of the upstream bucket")
		}
	}
}

func (c *checker) keyRef(path, key string, cfg Config) {
	if key == "" {
		c.fail(path, "missing: which of the keys (%s)?", strings.Join(slices.Sorted(maps.Keys(cfg.Keys)), ", "))
	} else if _, ok := cfg.Keys[key]; !ok {
		c.fail(path, "there is no key called %q under keys (%s)", key, strings.Join(slices.Sorted(maps.Keys(cfg.Keys)), ", "))
	}
}

func (c *checker) directory(path, dir, what string) bool {
	if !c.required(path, dir, what) {
		return false
	}
	if !filepath.IsAbs(dir) {
		c.fail(path, "must be an absolute path, not %q", dir)
		return false
	}
	if filepath.Clean(dir) == "/" {
		c.fail(path, "cannot be /")
		return false
	}
	return true
}

// within tells whether dir is parent or lies inside it.
func within(dir, parent string) bool {
	rel, err := filepath.Rel(parent, dir)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

func (c *checker) oneOf(path, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		c.fail(path, "%q is none of %s", value, strings.Join(allowed, ", "))
	}
}

func (c *checker) within(path string, d Duration, low, high time.Duration) {
	if d.Duration < low || d.Duration > high {
		c.fail(path, "%v is not between %v and %v", d.Duration, low, high)
	}
}

// endpoint checks the address of a service. Plain http to KMS would carry data keys in the clear; an
// upstream only ever sees sealed bytes, so there it is the operator's choice.
func (c *checker) endpoint(path, endpoint string, plainAllowed bool) {
	if endpoint == "" {
		return
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		c.fail(path, "%q is not an address such as https://kms.example.com", endpoint)
		return
	}
	if u.Scheme == "http" && !plainAllowed && !isLoopback(u.Hostname()) {
		c.fail(path, "%q: plain http is for this machine only (a stand-in for trying and testing); use https", endpoint)
	}
}

// listen checks an address to listen at; addresses that others can reach need to be asked for.
func (c *checker) listen(section, address string, allowRemote bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "" {
		c.fail(section+".listen", "%q is not ADDRESS:PORT, such as 127.0.0.1:9180", address)
		return
	}
	if !allowRemote && !isLoopback(host) {
		c.fail(section+".listen", "%q can be reached from other machines; say allowRemote: true in %s when that is meant", address, section)
	}
}

// isLocal tells whether an address of a service is on this machine.
func isLocal(endpoint string) bool {
	u, err := url.Parse(endpoint)
	return err == nil && isLoopback(u.Hostname())
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// checksumsFor says whether an endpoint is one of AWS, which takes checksums and may demand them.
func checksumsFor(endpoint string) string {
	u, err := url.Parse(endpoint)
	if endpoint == "" || err == nil && u.Scheme == "https" && (strings.HasSuffix(u.Hostname(), ".amazonaws.com") || strings.HasSuffix(u.Hostname(), ".amazonaws.com.cn")) {
		return checksumsSend
	}
	return checksumsOmit
}
