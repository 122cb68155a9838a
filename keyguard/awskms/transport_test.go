package awskms

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
)

// A server that knows HTTP/2, as a proxy or an endpoint of one's own may, is spoken to in HTTP/1.1 by both clients.
func TestServersWithHTTP2(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Proto)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	authorities := server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	for name, configured := range map[string]*awshttp.BuildableClient{
		"fresh": awshttp.NewBuildableClient(),
		"with authorities": awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
			t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		}),
	} {
		trusting := configured.WithTransportOptions(func(t *http.Transport) {
			if t.TLSClientConfig == nil {
				t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
			}
			t.TLSClientConfig.RootCAs = authorities
		})
		pooled, direct := transports(trusting)
		for kind, client := range map[string]interface {
			Do(*http.Request) (*http.Response, error)
		}{"pooled": pooled, "direct": direct} {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			response, err := client.Do(request)
			if err != nil {
				t.Errorf("%s, %s: %v", name, kind, err)
				continue
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err != nil || string(body) != "HTTP/1.1" {
				t.Errorf("%s, %s: %q, %v", name, kind, body, err)
			}
		}
	}
}
