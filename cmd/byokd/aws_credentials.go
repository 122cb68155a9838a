package main

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
)

const (
	// renewAhead is how long before their end credentials are renewed, in the background: so
	// long may STS or the pod's credential endpoint be away without anybody noticing. Of
	// credentials that live shorter it is the second half of their life.
	renewAhead = 5 * time.Minute
	// renewTimeout gives up one attempt, as a probe of KMS is given up. The SDK's own cache would wait
	// for a silent endpoint as long as the connection lasts, and everybody with it.
	renewTimeout = 3 * time.Second
	// renewPause lies between the beginnings of two attempts: with a second to notice and
	// the unwrap, the two seconds of a thaw hold from when the endpoint answers again.
	renewPause = 500 * time.Millisecond
	// maxRenewals bounds the attempts at a time, of which there are several only where there are no
	// credentials: one that hangs is not waited for by the next, for its endpoint may answer again.
	maxRenewals = int(renewTimeout / renewPause)
	// distrustPause lies between two renewals because AWS refused what we have.
	distrustPause = 5 * time.Second
)

// liveCredentials are byokd's own AWS credentials, from AWS' standard chain. Where the
// SDK reads the shared files once and holds on to what it has, these are read anew when a
// file was replaced, before they expire, and when AWS refuses them; what is good until
// then goes on to be used. Safe for concurrent use.
type liveCredentials struct {
	read    func(context.Context) (aws.CredentialsProvider, error) // the chain, from its beginning; called concurrently
	now     func() time.Time
	timeout time.Duration // of one attempt

	mu         sync.Mutex
	held       aws.Credentials // mu; the zero value: none yet
	renewAt    time.Time       // mu; zero: never by itself
	files      [2]os.FileInfo  // mu; shared files as they were when held was asked for; nil: absent
	heldBy     int             // mu; the attempt that gave held
	begun      int             // mu; attempts so far
	underway   int             // mu; attempts
	ended      chan struct{}   // mu; closed when the next attempt ends; nil while none is under way
	failed     error           // mu; of the last attempt, if it gave none
	failedBy   int             // mu; that attempt
	next       time.Time       // mu; no attempt begins earlier
	distrusted time.Time       // mu; when AWS last refused held
}

// newLiveCredentials takes its first credentials from first, and later ones from the chain.
func newLiveCredentials(first aws.CredentialsProvider, region string) *liveCredentials {
	var taken atomic.Bool
	read := func(ctx context.Context) (aws.CredentialsProvider, error) {
		if first != nil && !taken.Swap(true) {
			return first, nil
		}
		options := []func(*config.LoadOptions) error{config.WithHTTPClient(awshttp.NewBuildableClient().WithTimeout(renewTimeout))}
		if region != "" {
			options = append(options, config.WithRegion(region))
		}
		cfg, err := config.LoadDefaultConfig(ctx, options...)
		return cfg.Credentials, err
	}
	return &liveCredentials{read: read, now: time.Now, timeout: renewTimeout}
}

// Retrieve returns credentials that have not expired. It waits only where there are none, and no longer than the attempt that
// was begun last when it was called.
func (l *liveCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	for last := 0; ; {
		l.mu.Lock()
		now := l.now()
		good := l.held.HasKeys() && !(l.held.CanExpire && !now.Before(l.held.Expires))
		due := !good || !l.renewAt.IsZero() && !now.Before(l.renewAt) || l.replacedLocked()
		answered := last > 0 && max(l.failedBy, l.heldBy) >= last
		if due && !answered && !now.Before(l.next) && (l.underway == 0 || !good && l.underway < maxRenewals) {
			l.renewLocked(now)
		}
		if last == 0 {
			last = l.begun
		}
		held, ended, failed := l.held, l.ended, l.failed
		var another <-chan time.Time
		if l.underway < maxRenewals {
			another = time.After(l.next.Sub(now))
		}
		l.mu.Unlock()
		switch {
		case good:
			return held, nil
		case (answered || ended == nil) && failed != nil:
			return aws.Credentials{}, failed
		case answered || ended == nil:
			return aws.Credentials{}, errors.New("those that were given have expired already")
		}
		select {
		case <-ended:
		case <-another:
		case <-ctx.Done():
			return aws.Credentials{}, ctx.Err()
		}
	}
}

// Invalidate says that AWS has refused the credentials: they are read anew.
func (l *liveCredentials) Invalidate() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.now(); now.Sub(l.distrusted) >= distrustPause {
		l.distrusted, l.renewAt = now, now
	}
}

// renewLocked begins an attempt, which nobody's context ends.
func (l *liveCredentials) renewLocked(now time.Time) {
	l.begun++
	l.underway++
	if l.ended == nil {
		l.ended = make(chan struct{})
	}
	attempt := l.begun
	l.next = now.Add(renewPause + rand.N(renewPause/2))
	l.files = sharedFiles() // before they are read: what is replaced meanwhile is read again
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), l.timeout)
		defer cancel()
		held, err := l.fetch(ctx)
		l.mu.Lock()
		defer l.mu.Unlock()
		switch {
		case attempt < l.heldBy: // a later one has given some
		case err == nil:
			l.held, l.renewAt, l.heldBy, l.failed = held, renewalOf(held, l.now()), attempt, nil
		default:
			l.failed, l.failedBy = err, max(l.failedBy, attempt)
		}
		close(l.ended)
		l.ended = nil
		if l.underway--; l.underway > 0 {
			l.ended = make(chan struct{})
		}
	}()
}

// fetch asks a provider of its own each time: one that hangs is left alone.
func (l *liveCredentials) fetch(ctx context.Context) (aws.Credentials, error) {
	provider, err := l.read(ctx)
	if err != nil {
		return aws.Credentials{}, err
	}
	if provider == nil {
		return aws.Credentials{}, errors.New("none configured")
	}
	return provider.Retrieve(ctx)
}

// renewalOf is when credentials that were given now are renewed; zero: never by itself.
func renewalOf(c aws.Credentials, now time.Time) time.Time {
	if !c.CanExpire {
		return time.Time{}
	}
	return c.Expires.Add(-min(renewAhead, c.Expires.Sub(now)/2))
}

// sharedFiles looks at the files of AWS' chain that the SDK reads once.
func sharedFiles() (files [2]os.FileInfo) {
	for i, path := range []string{
		cmp.Or(os.Getenv("AWS_SHARED_CREDENTIALS_FILE"), config.DefaultSharedCredentialsFilename()),
		cmp.Or(os.Getenv("AWS_CONFIG_FILE"), config.DefaultSharedConfigFilename()),
	} {
		files[i], _ = os.Stat(path) // what cannot be looked at is as good as absent
	}
	return files
}

// replacedLocked reports whether a shared file is another one than when it was read.
func (l *liveCredentials) replacedLocked() bool {
	for i, now := range sharedFiles() {
		was := l.files[i]
		if (was == nil) != (now == nil) ||
			was != nil && (!os.SameFile(was, now) || !was.ModTime().Equal(now.ModTime()) || was.Size() != now.Size()) {
			return true
		}
	}
	return false
}
