package main

import (
	"context"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard/awskms"
	"github.com/byokd/byokd/objstore"
)

// awsConfigs reads AWS' standard chain (environment, files, IRSA, Pod Identity, instance profile) once for each
// region: each reading parses all authorities of AWS_CA_BUNDLE, some 5 ms for which callers wait when a worker
// is started again, and has credentials of its own to fetch. The zero value is ready, and safe for concurrent use.
type awsConfigs struct {
	mu   sync.Mutex
	read map[string]aws.Config // by region; guarded by mu
}

// in returns the configuration for a region, or for that of the environment if it is empty.
func (a *awsConfigs) in(ctx context.Context, region string) (aws.Config, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if cfg, found := a.read[region]; found {
		return cfg.Copy(), nil
	}
	var options []func(*config.LoadOptions) error
	if region != "" {
		options = append(options, config.WithRegion(region))
	}
	cfg, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return aws.Config{}, err
	}
	cfg.Credentials = newLiveCredentials(cfg.Credentials, region)
	if a.read == nil {
		a.read = map[string]aws.Config{}
	}
	a.read[region] = cfg
	return cfg.Copy(), nil
}

// newKMS makes the client of one key: its region stands in its ARN.
func (a *awsConfigs) newKMS(ctx context.Context, key KeyConfig) (*awskms.Client, error) {
	cfg, err := a.in(ctx, regionOfARN(key.ARN))
	if err != nil {
		return nil, err
	}
	return awskms.New(cfg, key.ARN, awskms.Options{Endpoint: key.Endpoint})
}

// newUpstream makes the client of one bucket below the proxy.
func (a *awsConfigs) newUpstream(ctx context.Context, u UpstreamConfig) (objstore.Upstream, error) {
	cfg, err := a.in(ctx, u.Region)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(cfg, objstore.TuneClient, func(o *s3.Options) {
		if u.Checksums == checksumsSend {
			objstore.SendChecksums(o)
		}
		if u.Endpoint != "" {
			o.BaseEndpoint, o.UsePathStyle = aws.String(u.Endpoint), true
		}
	})
	return objstore.NewUpstream(client, u.Bucket), nil
}
