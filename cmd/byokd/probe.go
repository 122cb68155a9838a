package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// maxProbeAnswer is what kubelet keeps of a probe's words in an Event.
const maxProbeAnswer = 1 << 10

func newProbeCommand(environ []string) *cobra.Command {
	endpoints := map[string]string{"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
	var admin string
	cmd := &cobra.Command{
		Use: "probe startup|readiness|liveness", Short: "Ask a running byokd for its health, as a probe of Kubernetes that says why not",
		Args: cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs), ValidArgs: []string{"startup", "readiness", "liveness"},
		Long: `Asks the admin listener and prints its answer. kubelet makes what a failing command prints an Event of the pod, so that
` + "`kubectl describe pod`" + ` tells why a pod waits; of a probe by http it tells the status code only.

Exit codes:
  0   healthy
  1   not healthy; the reason is printed
  20  no byokd answers at the address`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return probe(cmd.Context(), adminURL(adminAddress(admin, environ))+endpoints[args[0]], cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&admin, "admin", "", adminUsage)
	return cmd
}

// adminUsage explains --admin.
const adminUsage = "address of the admin listener; left out, BYOKD_ADMIN_LISTEN, else " + defaultAdminListen

// adminAddress is where the byokd of this container listens: with an address of all interfaces, on loopback, too.
func adminAddress(flag string, environ []string) string {
	if flag != "" {
		return flag
	}
	at := slices.IndexFunc(environ, func(e string) bool { return strings.HasPrefix(e, envName("admin.listen")+"=") })
	if at < 0 {
		return defaultAdminListen
	}
	_, address, _ := strings.Cut(environ[at], "=")
	return dialable(address)
}

// dialable is where to reach what listens at an address of this machine.
func dialable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("localhost", port)
	}
	return address
}

func probe(ctx context.Context, url string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return exitWith(exitUsage, err)
	}
	answer, err := (&http.Client{Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return exitWith(exitNoAnswer, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxProbeAnswer))
	if err != nil {
		return exitWith(exitNoAnswer, err)
	}
	if _, err := fmt.Fprintln(out, strings.TrimSpace(string(text))); err != nil {
		return exitWith(exitFailure, err)
	}
	if answer.StatusCode != http.StatusOK {
		return &exitError{exitFailure, nil}
	}
	return nil
}
