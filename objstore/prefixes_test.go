package objstore_test

import (
	"slices"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// TestDelimiterInsideOwnPrefix lists with delimiters that occur in the prefix of
// byokd's own objects: a common prefix is shown if, and only if, a client's object
// has it.
func TestDelimiterInsideOwnPrefix(t *testing.T) {
	for _, c := range []struct {
		prefix, delimiter, key string // of a client's object; may be empty
		want                   []string
	}{
		{"", "b", "", nil},
		{"", "b", ".abc", []string{".ab"}},
		{"", "b", ".b", []string{".b"}},
		{"", "b", ".bashrc", []string{".b"}},
		{"", "b", ".bz", []string{".b"}},
		{"", "byokd", ".byokd0", []string{".byokd"}},
		{"", "d", ".byokd.txt", []string{".byokd"}},
		{".b", "k", "", nil},
		{".b", "k", ".byok", []string{".byok"}},
		{"", "/", "", nil},
		{"", "e", "", nil}, // inside the names of byokd's objects
		{"", ".", "", nil},
		{"", ".", ".x", []string{"."}},
		{"b", "b", "b1b", []string{"b1b"}},
	} {
		w := newWorld(t, worldOptions{})
		w.put("zzz", []byte("x")) // makes the keyring, too
		if c.key != "" {
			w.put(c.key, []byte("x"))
		}
		prefixes := func(list []types.CommonPrefix) (all []string) {
			for _, p := range list {
				all = append(all, *p.Prefix)
			}
			return all
		}
		v1, err := w.client.ListObjects(t.Context(), &s3.ListObjectsInput{Bucket: documents, Prefix: &c.prefix, Delimiter: &c.delimiter})
		if err != nil {
			t.Fatal(err)
		}
		v2, err := w.client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: documents, Prefix: &c.prefix, Delimiter: &c.delimiter})
		if err != nil {
			t.Fatal(err)
		}
		if got := prefixes(v1.CommonPrefixes); !slices.Equal(got, c.want) {
			t.Errorf("prefix %q, delimiter %q beside %q: version 1 shows %q, not %q", c.prefix, c.delimiter, c.key, got, c.want)
		}
		if got := prefixes(v2.CommonPrefixes); !slices.Equal(got, c.want) || int(*v2.KeyCount) != len(got)+len(v2.Contents) {
			t.Errorf("prefix %q, delimiter %q beside %q: version 2 shows %q of %d, not %q", c.prefix, c.delimiter, c.key, got, *v2.KeyCount, c.want)
		}
		// Paging goes on behind a page that shows nothing.
		seen := 0
		for marker := ""; ; {
			page, err := w.client.ListObjects(t.Context(), &s3.ListObjectsInput{Bucket: documents, Prefix: &c.prefix, Delimiter: &c.delimiter, Marker: &marker, MaxKeys: aws.Int32(1)})
			if err != nil {
				t.Fatal(err)
			}
			seen += len(page.CommonPrefixes) + len(page.Contents)
			if !*page.IsTruncated {
				break
			}
			if *page.NextMarker <= marker {
				t.Fatalf("page after %q ends at %q", marker, *page.NextMarker)
			}
			marker = *page.NextMarker
		}
		if seen != int(*v2.KeyCount) {
			t.Errorf("prefix %q, delimiter %q beside %q: %d in pages of one", c.prefix, c.delimiter, c.key, seen)
		}
	}
}
