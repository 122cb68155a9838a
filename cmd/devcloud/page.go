package main

import (
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"html/template"
	"net/http"
	"strings"

	"github.com/byokd/byokd/keyguard/kmstest"
)

//go:embed page.html
var pageText string

// isPage tells a browser that wants to see something from an S3 client that
// lists buckets: both send GET /.
func isPage(r *http.Request) bool {
	return r.Method == http.MethodGet && r.URL.Path == "/" && r.Header.Get("Authorization") == "" &&
		r.URL.RawQuery == "" && strings.Contains(r.Header.Get("Accept"), "text/html")
}

// pageData is what the template needs; the rest comes from the control interface.
type pageData struct {
	Nonce, Host, Account, Region, Alias string
	Tenant, TenantKey, TenantSecret     string
	Admin, AdminSecret                  string
}

// newPage serves the control page. It can be neither framed nor fed with foreign
// scripts, and it acts through the control interface, which refuses other origins.
func newPage() http.Handler {
	text := template.Must(template.New("page").Parse(pageText))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := kmstest.CheckLocal(r); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		var raw [16]byte
		rand.Read(raw[:])
		nonce := hex.EncodeToString(raw[:])
		h := w.Header()
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Content-Security-Policy", "default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-"+nonce+
			"'; script-src 'nonce-"+nonce+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		text.Execute(w, pageData{
			Nonce: nonce, Host: r.Host, Account: kmstest.DefaultAccount, Region: kmstest.DefaultRegion, Alias: setupAlias,
			Tenant: kmstest.TenantRole, TenantKey: kmstest.TenantAccessKey, TenantSecret: kmstest.TenantSecret,
			Admin: kmstest.AdminAccessKey, AdminSecret: kmstest.AdminSecret,
		})
	})
}
