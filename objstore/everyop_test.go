package objstore_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// recorder is an HTTP client that keeps what was answered.
type recorder struct{ answers bytes.Buffer }

func (r *recorder) Do(req *http.Request) (*http.Response, error) {
	response, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(response.Body)
	response.Body.Close()
	r.answers.Write(body)
	response.Body = io.NopCloser(bytes.NewReader(body))
	return response, err
}

// unusual are fields that make byokd or an SDK refuse a request for their own sake.
var unusual = regexp.MustCompile(`^(SSE|CopySource.*|.*Checksum.*|ContentMD5|.*If(None)?Match.*|.*Modified.*|Expires|MFA|WriteOffsetBytes|Range|ServerSide.*|.*Directive|Rename.*|noSmithyDocumentSerde)`)

// fill gives every field of an input a value, so that no operation is refused by
// the SDK itself for want of one; all of them, or the usual ones.
func fill(v reflect.Value, depth int, all bool) {
	if depth > 6 {
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), depth+1, all)
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() && !unusual.MatchString(f.Name) || depth == 0 && all {
				fill(v.Field(i), depth+1, all)
			}
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			v.SetBytes([]byte(canary))
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), depth+1, all)
	case reflect.String:
		v.SetString("x")
	case reflect.Int32, reflect.Int64:
		v.SetInt(1)
	case reflect.Interface:
		if v.Type() == reflect.TypeFor[io.Reader]() {
			v.Set(reflect.ValueOf(bytes.NewReader([]byte(canary))))
		}
	}
}

// TestEveryOperationOfTheSDK calls whatever the SDK can call, on a bucket and an
// object of byokd, with an upstream that takes every request it does not know for
// a plain GET or PUT: the worst there is. Nothing plain may be stored, nothing
// sealed may come back, and the object stays what it is unless the operation is
// one that writes it.
func TestEveryOperationOfTheSDK(t *testing.T) {
	writes := []string{"PutObject", "CopyObject", "DeleteObject", "DeleteObjects"}
	client := reflect.TypeFor[*s3.Client]()
	asked := 0
	w := newWorld(t, worldOptions{})
	for i := range client.NumMethod() {
		method := client.Method(i)
		if method.Type.NumIn() < 3 || method.Type.In(2).Kind() != reflect.Pointer || !strings.HasSuffix(method.Type.In(2).Elem().Name(), "Input") {
			continue
		}
		if slices.Contains([]string{"WriteGetObjectResponse", "CreateSession"}, method.Name) {
			continue // these go to hosts of their own
		}
		for _, detail := range []string{"least", "usual", "all"} {
			w.put("o", []byte(canary+" as it was"))
			rec := &recorder{}
			in := reflect.New(method.Type.In(2).Elem())
			if detail != "least" {
				fill(in.Elem(), 0, detail == "all")
			}
			for name, value := range map[string]any{"Bucket": aws.String("documents"), "Key": aws.String("o"), "CopySource": aws.String("documents/o"), "Body": io.Reader(bytes.NewReader([]byte(canary)))} {
				if f := in.Elem().FieldByName(name); f.IsValid() && reflect.TypeOf(value).AssignableTo(f.Type()) {
					f.Set(reflect.ValueOf(value))
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			tune := func(o *s3.Options) { o.HTTPClient = rec }
			out := reflect.ValueOf(w.newClient(tune)).MethodByName(method.Name).Call([]reflect.Value{reflect.ValueOf(ctx), in})
			cancel()
			if rec.answers.Len() > 0 {
				asked++
			}
			err, _ := out[1].Interface().(error)
			w.noPlaintext()
			if bytes.Contains(rec.answers.Bytes(), []byte("byokdobj")) {
				t.Errorf("%s returned sealed bytes", method.Name)
			}
			if slices.Contains(writes, method.Name) {
				continue
			}
			if body, _, getErr := w.get("o", ""); getErr != nil || string(body) != canary+" as it was" {
				t.Errorf("after %s (%v) the object is %q: %v", method.Name, err, body, getErr)
			}
		}
	}
	if asked < 150 {
		t.Fatalf("only %d operations were tried", asked)
	}
	t.Logf("%d calls", asked)
}
