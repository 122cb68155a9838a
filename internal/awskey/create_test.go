package awskey

import (
	"context"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/byokd/byokd/internal/keypolicy"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// cloud is a KMS over HTTP, asked by the SDK with the credentials of the keys' owner.
type cloud struct {
	*testing.T
	server *kmstest.Server
	url    string
}

func newCloud(t *testing.T, o kmstest.Options) *cloud {
	t.Helper()
	server, err := kmstest.New(o)
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(server)
	t.Cleanup(func() {
		server.Interrupt()
		web.Close()
		server.Close()
	})
	return &cloud{t, server, web.URL}
}

func (c *cloud) client(region string) *kms.Client {
	return kms.New(kms.Options{Region: region, BaseEndpoint: aws.String(c.url), Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(kmstest.AdminAccessKey, kmstest.AdminSecret, "")})
}

func (c *cloud) options() CreateOptions {
	c.Helper()
	policy, err := keypolicy.Text(keypolicy.Full, kmstest.DefaultAccount, kmstest.TenantRole)
	if err != nil {
		c.Fatal(err)
	}
	return CreateOptions{Alias: "acme", Region: "eu-central-1", ReplicaRegion: "eu-west-1", Description: "of the test", Policy: policy,
		Tags: map[string]string{"team": "storage"}, Client: c.client}
}

func (c *cloud) count() int {
	c.Helper()
	keys, err := c.server.Keys()
	if err != nil {
		c.Fatal(err)
	}
	return len(keys)
}

// mustBeComplete looks at the key behind the alias.
func (c *cloud) mustBeComplete(arn, region string) {
	c.Helper()
	ctx, client := c.Context(), c.client(region)
	described, err := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String("alias/acme")})
	if err != nil {
		c.Error(err)
		return
	}
	if *described.KeyMetadata.Arn != arn || described.KeyMetadata.KeyState != "Enabled" {
		c.Errorf("alias/acme in %s is %s, %s", region, *described.KeyMetadata.Arn, described.KeyMetadata.KeyState)
	}
	rotation, err := client.GetKeyRotationStatus(ctx, &kms.GetKeyRotationStatusInput{KeyId: &arn})
	if err != nil || !rotation.KeyRotationEnabled {
		c.Errorf("rotation of %s: %v", arn, err)
	}
	tags, err := client.ListResourceTags(ctx, &kms.ListResourceTagsInput{KeyId: &arn})
	if err != nil || len(tags.Tags) != 2 {
		c.Errorf("tags of %s: %v, %v", arn, tags, err)
	}
	policy, err := client.GetKeyPolicy(ctx, &kms.GetKeyPolicyInput{KeyId: &arn, PolicyName: aws.String("default")})
	if err != nil || !keypolicy.Same(*policy.Policy, c.options().Policy) {
		c.Errorf("policy of %s: %v, %v", arn, policy, err)
	}
}

func TestCreate(t *testing.T) {
	c := newCloud(t, kmstest.Options{ReplicaDelay: 1500 * time.Millisecond})
	o := c.options()
	o.DryRun = true
	plan, err := Create(t.Context(), o)
	if err != nil || plan.ARN != "" || len(plan.Actions) != 5 || c.count() != 0 {
		t.Fatalf("dry run: %+v, %v, %d keys", plan, err, c.count())
	}
	made, err := Create(t.Context(), c.options())
	if err != nil || made.Replica != inRegion(made.ARN, "eu-west-1") {
		t.Fatalf("%+v, %v", made, err)
	}
	if !reflect.DeepEqual(made.Actions, plan.Actions) {
		t.Errorf("it did %q, and the dry run told %q", made.Actions, plan.Actions)
	}
	c.mustBeComplete(made.ARN, "eu-central-1")
	c.mustBeComplete(made.Replica, "eu-west-1")
	again, err := Create(t.Context(), c.options())
	if err != nil || again.ARN != made.ARN || again.Replica != made.Replica || len(again.Actions) != 0 || c.count() != 2 {
		t.Errorf("again: %+v, %v, %d keys", again, err, c.count())
	}
}

// Create fails at each of its calls in turn; the next run completes the key and makes no second one.
func TestCreateFailsAtEachCall(t *testing.T) {
	for _, operation := range []string{"CreateKey", "CreateAlias", "GetKeyRotationStatus", "EnableKeyRotation", "ReplicateKey", "DescribeKey", "ListKeys", "GetKeyPolicy"} {
		for skip := range 2 {
			c := newCloud(t, kmstest.Options{})
			_, err := c.server.Inject(kmstest.Fault{Kind: kmstest.FaultError, Operations: []string{operation}, Skip: skip, Count: 1, Status: 500})
			if err != nil {
				t.Fatal(err)
			}
			_, first := Create(t.Context(), c.options())
			c.server.Clear()
			if first == nil && skip == 0 {
				t.Errorf("%s fails and nobody notices", operation)
			}
			made, err := Create(t.Context(), c.options())
			if err != nil || c.count() != 2 {
				t.Errorf("after a failed %s (after %d): %v, %d keys", operation, skip, err, c.count())
				continue
			}
			c.mustBeComplete(made.ARN, "eu-central-1")
			c.mustBeComplete(made.Replica, "eu-west-1")
		}
	}
}

func TestCreateKeepsWhatIsThere(t *testing.T) {
	c := newCloud(t, kmstest.Options{})
	made, err := Create(t.Context(), c.options())
	if err != nil {
		t.Fatal(err)
	}
	other := kmstest.DocumentedPolicy(kmstest.DefaultAccount, "arn:aws:iam::111122223333:role/other")
	if err := c.server.PutPolicy(made.ARN, other); err != nil {
		t.Fatal(err)
	}
	var told []string
	o := c.options()
	o.Tell = func(line string) { told = append(told, line) }
	if again, err := Create(t.Context(), o); err != nil || len(again.Actions) != 0 || !strings.Contains(strings.Join(told, " "), "--replace-policy") {
		t.Errorf("%+v, %v, told %q", again, err, told)
	}
	if now, err := c.server.Policy(made.ARN); err != nil || now != other {
		t.Errorf("the policy was replaced: %s, %v", now, err)
	}
	o.ReplacePolicy = true
	if _, err := Create(t.Context(), o); err != nil {
		t.Error(err)
	}
	c.mustBeComplete(made.ARN, "eu-central-1")

	for name, spoil := range map[string]func() error{
		"disabled":          func() error { return c.server.Disable(made.ARN) },
		"deletion is sched": func() error { return c.server.ScheduleDeletion(made.Replica, 7*24*time.Hour) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if _, err := Create(t.Context(), c.options()); err == nil || c.count() != 2 {
			t.Errorf("%s: %v, %d keys", name, err, c.count())
		}
		if err := c.server.Enable(made.ARN); err != nil {
			t.Fatal(err)
		}
	}
}

// An alias of another kind of key is no place to make one.
func TestCreateRefusesAnotherKind(t *testing.T) {
	c := newCloud(t, kmstest.Options{})
	o := c.options()
	o.ReplicaRegion = ""
	single, err := Create(t.Context(), o)
	if err != nil || single.Replica != "" {
		t.Fatalf("%+v, %v", single, err)
	}
	if _, err := Create(t.Context(), c.options()); err == nil || !strings.Contains(err.Error(), "cannot be replicated") || c.count() != 1 {
		t.Errorf("%v, %d keys", err, c.count())
	}
}

func TestCreateEndsWithItsContext(t *testing.T) {
	c := newCloud(t, kmstest.Options{ReplicaDelay: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	o := c.options()
	o.Tell = func(line string) {
		if strings.HasPrefix(line, "replicate") {
			cancel()
		}
	}
	if _, err := Create(ctx, o); err == nil {
		t.Error("it does not end")
	}
}
