package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/awskey"
	"github.com/byokd/byokd/internal/control"
	"github.com/byokd/byokd/keyguard/fleet"
	"github.com/byokd/byokd/metrics"
)

// askListener bounds the question who listens at an address of this machine.
const askListener = 2 * time.Second

// listeners checks the places at which byokd is to listen. What the byokd that runs with this configuration has is in order.
type listeners struct {
	cfg  Config
	runs bool    // such a byokd answers at admin.listen
	own  holders // its processes, as far as they can be seen
}

// listenersGroup checks where byokd is to listen.
func listenersGroup(ctx context.Context, cfg Config) checkGroup {
	l := &listeners{cfg: cfg}
	g := checkGroup{Name: "listeners", Checks: []awskey.Check{l.admin(ctx)}}
	if cfg.Objects != nil {
		g.Checks = append(g.Checks, l.address("S3", "objects", cfg.Objects.Listen, "tcp"))
	}
	if cfg.Fleet != nil {
		g.Checks = append(g.Checks, l.address("fleet", "fleet", cfg.Fleet.Listen, "udp"))
	}
	if cfg.Admin.Socket != "" {
		g.Checks = append(g.Checks, l.socket())
	}
	return g
}

// admin checks the address of the admin listener, and finds out whether byokd runs already.
func (l *listeners) admin(ctx context.Context) awskey.Check {
	at := l.cfg.Admin.Listen
	err := tryListen("admin", at, "tcp")
	if !errors.Is(err, unix.EADDRINUSE) {
		return l.free("admin", "admin", at, err)
	}
	who := holdersOf("tcp", at)
	report, asked := askStatus(ctx, at)
	if asked == nil && l.cfg.runsAs(report) {
		l.runs, l.own = true, who
		return awskey.Check{Name: "admin", Result: awskey.Pass, Detail: fmt.Sprintf("%s: the byokd that runs with this configuration, %v", at, who)}
	}
	if asked == nil {
		return outcome("admin", "", "stop that byokd, or give this one an admin.listen of its own",
			fmt.Errorf("%s: another byokd listens there, %v, of cluster %q with %s", at, who, report.Cluster, places(report)))
	}
	return l.taken("admin", "admin", at, who)
}

// address checks any other address.
func (l *listeners) address(name, section, at, network string) awskey.Check {
	err := tryListen(section, at, network)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l.free(name, section, at, err)
	}
	who := holdersOf(network, at)
	if l.runs && who.mayBe(l.own) {
		return awskey.Check{Name: name, Result: awskey.Pass, Detail: fmt.Sprintf("%s: the byokd that runs with this configuration, %v", at, who)}
	}
	return l.taken(name, section, at, who)
}

// free tells of an address that nobody has; err is why it cannot be listened at all the same.
func (l *listeners) free(name, section, at string, err error) awskey.Check {
	next := fmt.Sprintf("correct %s.listen; the addresses of this machine: ip address", section)
	if errors.Is(err, unix.EACCES) {
		next = fmt.Sprintf("give %s.listen a port from 1024, or byokd CAP_NET_BIND_SERVICE", section)
	}
	return outcome(name, at+": free", next, err)
}

func (l *listeners) taken(name, section, at string, who holders) awskey.Check {
	return outcome(name, "", fmt.Sprintf("stop that program, or give %s.listen another port", section), fmt.Errorf("%s: in use by %v", at, who))
}

// socket checks the path of the control socket.
func (l *listeners) socket() awskey.Check {
	path := l.cfg.Admin.Socket
	peer, err := control.Look(path)
	if errors.Is(err, control.ErrInUse) {
		who := holders{peer.PID: ""}
		if peer.PID == 0 { // of another PID namespace
			who = holders{}
		}
		who.name()
		if l.runs && who.mayBe(l.own) {
			return awskey.Check{Name: "control socket", Result: awskey.Pass, Detail: fmt.Sprintf("%s: the byokd that runs with this configuration, %v", path, who)}
		}
		if _, port, _ := net.SplitHostPort(l.cfg.Admin.Listen); port == "0" {
			return awskey.Check{Name: "control socket", Result: awskey.Warn, NextStep: "give admin.listen a port of its own",
				Detail: fmt.Sprintf("%s: in use by %v; whether that is the byokd of this configuration cannot be asked, for its admin.listen is at any free port", path, who)}
		}
		return outcome("control socket", "", "stop that program, or give admin.socket a path of its own", fmt.Errorf("%s: in use by %v", path, who))
	}
	return outcome("control socket", path+": can be made", "give admin.socket a path at which byokd can make a file", err)
}

// tryListen listens for a moment.
func tryListen(section, at, network string) error {
	var socket io.Closer
	var err error
	if network == "udp" {
		socket, err = fleet.Listen(at)
	} else {
		socket, err = net.Listen(network, at)
	}
	if err != nil {
		return fmt.Errorf("%s.listen: %w", section, err)
	}
	return socket.Close()
}

// askStatus asks what listens at an address for the status of byokd.
func askStatus(ctx context.Context, at string) (report metrics.Report, err error) {
	ctx, cancel := context.WithTimeout(ctx, askListener)
	defer cancel()
	body, err := statusClient{url: adminURL(dialable(at))}.get(ctx, "/v1/status")
	if err != nil {
		return report, err
	}
	defer body.Close()
	if err := json.NewDecoder(io.LimitReader(body, maxReport)).Decode(&report); err != nil {
		return report, err
	}
	if report.Cluster == "" {
		return report, errors.New("the answer is no status of byokd")
	}
	return report, nil
}

// runsAs tells whether a report is of a byokd with this configuration, or with an older form of it: of the same cluster, with one
// of its resources.
func (c Config) runsAs(r metrics.Report) bool {
	return r.Cluster == c.Cluster.ID && slices.ContainsFunc(r.Resources, func(x metrics.ResourceReport) bool {
		if c.Volume != nil && x.Where == c.Volume.where() {
			return true
		}
		if c.Objects == nil {
			return false
		}
		for _, b := range c.Objects.Buckets {
			if strings.HasSuffix(x.Where, sealedIn(b)) {
				return true
			}
		}
		return false
	})
}

// places are the resources of a byokd.
func places(r metrics.Report) string {
	var all []string
	for _, x := range r.Resources {
		all = append(all, x.Where)
	}
	return strings.Join(all, "; ")
}
