package main

import (
	"net/http"
	"strings"

	"github.com/byokd/byokd/keyguard/kmstest"
)

func isPage(r *http.Request) bool {
	return r.Method == http.MethodGet && r.URL.Path == "/" && strings.Contains(r.Header.Get("Accept"), "text/html")
}

func newPage(keys *kmstest.Server) http.Handler { return http.NotFoundHandler() }
