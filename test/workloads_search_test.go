//go:build linux

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

const (
	searchWriters = 3
	searchReaders = 1
	bulkDocs      = 100 // documents in a request
	searchIndex   = "orders"
)

// harmlessSearch is what OpenSearch says at WARN or above at every start, on a busy machine, or while frozen with no
// consequence: docs/BEHAVIOUR.md lists it.
var harmlessSearch = []string{
	`\[DanglingIndicesState\] gateway.auto_import_dangling_indices is disabled`,
	`\[JvmGcMonitorService\] \[gc\]\[\d+\] overhead`,
	`\[InternalClusterInfoService\] Failed to update (node|shard) information for ClusterInfoUpdateJob within 15s timeout`, // asked again every 30 s
}

// searchNode is an OpenSearch node and its client.
type searchNode struct {
	*database
	data, home string
	process    *process
	endpoint   string
	loads      int // so far, which name the writers
	writes     acknowledgements
	reads      acknowledgements

	mu    sync.Mutex
	acked map[string]int // guarded by mu; writer: acknowledged bulk requests
}

func (n *searchNode) start() {
	n.t.Helper()
	n.process = n.jvm("opensearch", "search.SearchNode", n.data, n.home, "path.repo="+n.home)
	n.endpoint = "http://127.0.0.1:" + n.awaitLine(n.process, "READY")
	n.awaitLong("green", n.process, func() bool { return n.health() == "green" })
}

func (n *searchNode) health() string {
	var health struct {
		Status string `json:"status"`
	}
	if err := n.call(n.t.Context(), http.MethodGet, "/_cluster/health", nil, &health); err != nil {
		n.t.Fatal(err)
	}
	return health.Status
}

// call sends a request and decodes the answer, which must be a good one. It waits as long as the node does.
func (n *searchNode) call(ctx context.Context, method, path string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, n.endpoint+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %.500s", method, path, resp.Status, text)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}

func (n *searchNode) must(method, path, body string, answer any) {
	n.t.Helper()
	if err := n.call(n.t.Context(), method, path, []byte(body), answer); err != nil {
		n.t.Fatal(err)
	}
}

// order is a document; all of it follows from its name.
type order struct {
	Writer string `json:"writer"`
	Bulk   int    `json:"bulk"`
	Line   int    `json:"line"`
	Token  string `json:"token"`
	Text   string `json:"text"`
}

func (n *searchNode) order(writer string, bulk, line int) order {
	token := fmt.Sprintf("%s-%d-%d", writer, bulk, line)
	random := rand.New(rand.NewPCG(uint64(crc32.ChecksumIEEE([]byte(token))), 0))
	words := make([]string, 60)
	for i := range words {
		words[i] = fmt.Sprintf("w%05d", random.IntN(20_000))
	}
	return order{writer, bulk, line, token, n.canary + " " + strings.Join(words, " ")}
}

func (n *searchNode) createIndex() {
	n.t.Helper()
	n.must(http.MethodPut, "/"+searchIndex, `{"settings": {"number_of_shards": 2, "number_of_replicas": 0, "refresh_interval": "1s"},
"mappings": {"properties": {"writer": {"type": "keyword"}, "token": {"type": "keyword"}, "bulk": {"type": "integer"}, "line": {"type": "integer"}}}}`, nil)
}

// load is clients that index, and clients that look for what was acknowledged.
func (n *searchNode) load() (writers, readers *crew) {
	n.loads++
	names := make([]string, searchWriters)
	for i := range names {
		names[i] = fmt.Sprintf("load%d-%d", n.loads, i)
	}
	writers = n.newCrew(searchWriters, func(ctx context.Context, client int) {
		for bulk := 0; ctx.Err() == nil; bulk++ {
			if !n.write(names[client], bulk) {
				return
			}
		}
	})
	readers = n.newCrew(searchReaders, func(ctx context.Context, client int) {
		for random := rand.New(rand.NewPCG(1, uint64(client))); ctx.Err() == nil; {
			writer := names[random.IntN(len(names))]
			n.mu.Lock()
			acked := n.acked[writer]
			n.mu.Unlock()
			if acked == 0 {
				time.Sleep(10 * time.Millisecond) // until the first is written
				continue
			}
			n.read(writer, random.IntN(acked), random.IntN(bulkDocs))
		}
	})
	return writers, readers
}

// write indexes one bulk request and reports whether the client should go on.
func (n *searchNode) write(writer string, bulk int) bool {
	var body bytes.Buffer
	out := json.NewEncoder(&body)
	for line := range bulkDocs {
		o := n.order(writer, bulk, line)
		_ = out.Encode(map[string]any{"create": map[string]string{"_id": o.Token}}) // a bytes.Buffer takes all
		_ = out.Encode(o)
	}
	began := time.Now()
	var answer struct {
		Errors bool              `json:"errors"`
		Items  []json.RawMessage `json:"items"`
	}
	err := n.call(context.Background(), http.MethodPost, "/"+searchIndex+"/_bulk", body.Bytes(), &answer)
	if err == nil && (answer.Errors || len(answer.Items) != bulkDocs) {
		err = fmt.Errorf("bulk %s-%d: %d items, %.500s", writer, bulk, len(answer.Items), answer.Items)
	}
	n.writes.add(began, err)
	if err != nil {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.acked[writer] = bulk + 1
	return true
}

// read gets a document by its name, which must be as it was written, and searches for it: what was indexed before the
// last refresh is found once.
func (n *searchNode) read(writer string, bulk, line int) {
	want := n.order(writer, bulk, line)
	began := time.Now()
	var got struct {
		Source order `json:"_source"`
	}
	err := n.call(context.Background(), http.MethodGet, "/"+searchIndex+"/_doc/"+want.Token, nil, &got)
	if err == nil && got.Source != want {
		err = fmt.Errorf("document %s is %+v", want.Token, got.Source)
	}
	if err == nil {
		var found struct {
			Hits struct {
				Hits []struct {
					Source order `json:"_source"`
				} `json:"hits"`
			} `json:"hits"`
		}
		words := strings.Fields(want.Text)
		query := fmt.Sprintf(`{"query": {"bool": {"must": [{"term": {"token": %q}}, {"match_phrase": {"text": %q}}]}}}`, want.Token, strings.Join(words[len(words)-4:], " "))
		err = n.call(context.Background(), http.MethodPost, "/"+searchIndex+"/_search", []byte(query), &found)
		if hits := found.Hits.Hits; err == nil && (len(hits) > 1 || len(hits) == 1 && hits[0].Source != want) {
			err = fmt.Errorf("search for %s: %+v", want.Token, hits)
		}
	}
	n.reads.add(began, err)
}

// verify checks every document that was acknowledged, and returns how many they are.
func (n *searchNode) verify(when string) (documents int) {
	n.t.Helper()
	n.must(http.MethodPost, "/"+searchIndex+"/_refresh", "", nil)
	n.mu.Lock()
	defer n.mu.Unlock()
	for writer, bulks := range n.acked {
		for bulk := range bulks {
			var ids []string
			for line := range bulkDocs {
				ids = append(ids, fmt.Sprintf("%q", n.order(writer, bulk, line).Token))
			}
			var got struct {
				Docs []struct {
					Found  bool  `json:"found"`
					Source order `json:"_source"`
				} `json:"docs"`
			}
			n.must(http.MethodPost, "/"+searchIndex+"/_mget", `{"ids": [`+strings.Join(ids, ",")+`]}`, &got)
			for line, doc := range got.Docs {
				if !doc.Found || doc.Source != n.order(writer, bulk, line) {
					n.t.Fatalf("%s: document %s-%d-%d is lost or another: %+v", when, writer, bulk, line, doc)
				}
			}
			documents += len(got.Docs)
		}
		var count struct {
			Count int `json:"count"`
		}
		n.must(http.MethodPost, "/"+searchIndex+"/_count", fmt.Sprintf(`{"query": {"term": {"writer": %q}}}`, writer), &count)
		// One request may have been carried out without an answer when its node was killed.
		if count.Count < bulks*bulkDocs || count.Count > (bulks+1)*bulkDocs {
			n.t.Errorf("%s: a query finds %d documents of %s, acknowledged are %d", when, count.Count, writer, bulks*bulkDocs)
		}
	}
	var shards []struct {
		State string `json:"state"`
	}
	n.must(http.MethodGet, "/_cat/shards/"+searchIndex+"?format=json", "", &shards)
	if len(shards) != 2 || shards[0].State != "STARTED" || shards[1].State != "STARTED" || n.health() != "green" {
		n.t.Errorf("%s: shards %+v, health %s", when, shards, n.health())
	}
	n.t.Logf("%s: %d documents verified one by one, all shards started, green", when, documents)
	return documents
}

// quietLog checks that the node has said nothing about its disk.
func (n *searchNode) quietLog(when string, allowed ...string) {
	n.t.Helper()
	if bad := complaints(n.process.output(), append(harmlessSearch, allowed...)...); len(bad) > 0 {
		n.t.Errorf("%s, OpenSearch's log says:\n%.3000s", when, strings.Join(bad, "\n"))
	}
}

func newSearchNode(t *testing.T) *searchNode {
	requireWorkloads(t)
	d := newDatabase(t, withHold(20*time.Second))
	return &searchNode{database: d, data: d.mount + "/search", home: d.dir + "/search-home", acked: map[string]int{}}
}

// OpenSearch on a mount: every document through freezes in full flight, kill -9 while frozen, a snapshot and a restore
// through the proxy with freezes in them, restarts, Lucene's own check of every checksum.
func TestWorkloadSearch(t *testing.T) {
	n := newSearchNode(t)
	n.start()
	n.createIndex()
	writers, readers := n.load()
	n.awaitLong("documents", n.process, func() bool { return n.writes.count() > 20 && n.reads.count() > 20 })
	for _, length := range outages(t) {
		n.freezeInFlight(length, &n.writes, &n.reads)
	}
	n.askFrozen()
	n.quietLog("over the freezes")
	n.snapshot("first")
	writers.end()
	readers.end()
	n.verify("after freezes under load")
	n.killFrozen()
	n.restore("first")

	n.process.signal(syscall.SIGTERM)
	if !n.process.wait(workloadPatience) || n.process.code() != 128+int(syscall.SIGTERM) {
		t.Errorf("OpenSearch ended with %v\n%s", n.process.err, n.process.tail())
	}
	n.restart()
	n.checkIndex()
	n.start()
	n.verify("after restarts of both")
	n.quietLog("after the restart")
	n.process.signal(syscall.SIGTERM)
	n.process.wait(workloadPatience)
	n.assertSealed()
}

// askFrozen asks a frozen node what probes, monitors and clients ask: what needs no disk is answered, what writes hangs.
func (n *searchNode) askFrozen() {
	n.t.Helper()
	n.key(kmstest.KeyCommand{Do: "disable"})
	n.awaitState(metrics.StateFrozen)
	token := n.order("load1-0", 0, 0).Token
	for _, q := range []struct {
		method, path, body string
		want               string // "answers", "hangs", or "" where it depends on what the node holds in its own memory
	}{
		{http.MethodGet, "/", "", "answers"},
		{http.MethodGet, "/_cluster/health", "", ""},
		{http.MethodGet, "/_cluster/health?local=true", "", ""},
		{http.MethodGet, "/_cat/shards", "", ""},
		{http.MethodGet, "/_nodes/stats/fs", "", ""},
		{http.MethodGet, "/" + searchIndex + "/_doc/" + token, "", ""},
		{http.MethodPost, "/" + searchIndex + "/_search", `{"query": {"match": {"text": "` + n.canary + `"}}}`, ""},
		{http.MethodPut, "/" + searchIndex + "/_doc/frozen", `{"text": "asked while frozen"}`, "hangs"},
		{http.MethodPut, "/another", `{"settings": {"number_of_replicas": 0}}`, "hangs"},
	} {
		ctx, cancel := context.WithTimeout(n.t.Context(), 2*time.Second)
		err := n.call(ctx, q.method, q.path, []byte(q.body), nil)
		cancel()
		got := "answers"
		if errors.Is(err, context.DeadlineExceeded) {
			got = "hangs"
		} else if err != nil {
			n.t.Errorf("%s %s while frozen: %v", q.method, q.path, err)
		}
		if q.want != "" && got != q.want {
			n.t.Errorf("%s %s %s while frozen", q.method, q.path, got)
		}
		n.t.Logf("while frozen: %-4s %-40s %s", q.method, strings.ReplaceAll(q.path, token, "ID"), got)
	}
	var free unix.Statfs_t
	if err := unix.Statfs(n.mount, &free); err != nil || free.Bavail == 0 {
		n.t.Errorf("statfs of a frozen mount: %+v, %v", free, err)
	}
	n.key(kmstest.KeyCommand{Do: "enable"})
	n.awaitState(metrics.StateReady)
}

// snapshot takes one through the proxy under load, with a freeze in flight that is longer than byokd holds requests.
func (n *searchNode) snapshot(name string) {
	n.t.Helper()
	n.must(http.MethodPut, "/_snapshot/backups", fmt.Sprintf(`{"type": "s3", "settings": {"endpoint": %q, "bucket": "backups", "base_path": "search"}}`, n.s3), nil)
	n.must(http.MethodPut, "/_snapshot/backups/"+name, fmt.Sprintf(`{"indices": %q}`, searchIndex), nil)
	n.key(kmstest.KeyCommand{Do: "disable"})
	n.awaitState(metrics.StateFrozen)
	n.hold(5*time.Second, func() {})
	n.key(kmstest.KeyCommand{Do: "enable"})
	n.awaitState(metrics.StateReady)
	var state struct {
		Snapshots []struct {
			State  string          `json:"state"`
			Shards json.RawMessage `json:"shards"`
		} `json:"snapshots"`
	}
	n.awaitLong("the snapshot", n.process, func() bool {
		n.must(http.MethodGet, "/_snapshot/backups/"+name, "", &state)
		return state.Snapshots[0].State != "IN_PROGRESS"
	})
	if state.Snapshots[0].State != "SUCCESS" {
		n.t.Errorf("the snapshot over a freeze: %s, shards %s", state.Snapshots[0].State, state.Snapshots[0].Shards)
	}
	n.quietLog("over a snapshot with a freeze")
	n.t.Logf("snapshot %s over a freeze of 5s: %s", name, state.Snapshots[0].State)
}

// killFrozen kills the node under load while the disk is frozen, and starts it again after.
func (n *searchNode) killFrozen() {
	n.t.Helper()
	writers, readers := n.load()
	before := n.writes.count()
	n.awaitLong("documents", n.process, func() bool { return n.writes.count() > before+10 })
	n.key(kmstest.KeyCommand{Do: "disable"})
	n.awaitState(metrics.StateFrozen)
	n.process.signal(syscall.SIGKILL)
	if !n.process.wait(patience) {
		n.t.Fatal("a frozen node is not killed by SIGKILL")
	}
	writers.end() // each has lost its node
	readers.end()
	n.key(kmstest.KeyCommand{Do: "enable"})
	n.awaitState(metrics.StateReady)
	n.start()
	n.verify("after kill -9 while frozen")
	n.quietLog("after kill -9 while frozen")
	n.writes.reset()
	n.reads.reset()
}

// restore puts the snapshot in the place of the index, with a freeze in flight, and checks what was acknowledged
// before it was taken: the writers of the first node's load.
func (n *searchNode) restore(name string) {
	n.t.Helper()
	n.must(http.MethodPost, "/_snapshot/backups/"+name+"/_restore", fmt.Sprintf(`{"indices": %q, "rename_pattern": "(.+)", "rename_replacement": "restored-$1"}`, searchIndex), nil)
	n.key(kmstest.KeyCommand{Do: "disable"})
	n.awaitState(metrics.StateFrozen)
	n.hold(3*time.Second, func() {})
	n.key(kmstest.KeyCommand{Do: "enable"})
	n.awaitState(metrics.StateReady)
	n.awaitLong("the restored index to be green", n.process, func() bool { return n.health() == "green" })
	const written = `{"exists": {"field": "writer"}}` // not what askFrozen has sent
	var restored int
	for from := ""; ; {
		after := ""
		if from != "" {
			after = fmt.Sprintf(`, "search_after": [%q]`, from)
		}
		var page struct {
			Hits struct {
				Hits []struct {
					Source order `json:"_source"`
				} `json:"hits"`
			} `json:"hits"`
		}
		n.must(http.MethodPost, "/restored-"+searchIndex+"/_search", `{"size": 1000, "query": `+written+`, "sort": [{"token": "asc"}]`+after+`}`, &page)
		if len(page.Hits.Hits) == 0 {
			break
		}
		for _, hit := range page.Hits.Hits {
			from = hit.Source.Token
			if hit.Source != n.order(hit.Source.Writer, hit.Source.Bulk, hit.Source.Line) {
				n.t.Fatalf("the restored document %s is another: %+v", from, hit.Source)
			}
			restored++
		}
	}
	var count struct {
		Count int `json:"count"`
	}
	n.must(http.MethodPost, "/restored-"+searchIndex+"/_count", `{"query": `+written+`}`, &count)
	if restored == 0 || restored != count.Count {
		n.t.Errorf("%d documents were restored and verified, the index counts %d", restored, count.Count)
	}
	n.quietLog("over a restore with a freeze")
	n.t.Logf("restored through the proxy over a freeze of 3s: %d documents verified", restored)
}

// checkIndex has Lucene verify every checksum and structure of every shard, with no node running.
func (n *searchNode) checkIndex() {
	n.t.Helper()
	shards, err := filepath.Glob(n.data + "/nodes/0/indices/*/*/index")
	if err != nil || len(shards) < 4 { // two of the index, two of the restored one
		n.t.Fatalf("shards: %v, %v", shards, err)
	}
	for _, dir := range shards {
		text := n.finish(n.jvm("CheckIndex", "org.apache.lucene.index.CheckIndex", dir, "-slow"))
		if !strings.Contains(text, "No problems were detected with this index.") {
			n.t.Errorf("CheckIndex %s:\n%s", dir, text)
		}
	}
	n.t.Logf("CheckIndex -slow: no problems in %d shards", len(shards))
}

// What OpenSearch does in a second on byokd and on the directory below, beside each other.
func TestWorkloadSearchFigures(t *testing.T) {
	n := newSearchNode(t)
	raw := n.dir + "/raw"
	for round := range 2 {
		for _, place := range []string{raw, n.mount} {
			m := &searchNode{database: &database{n.within(t)}, data: fmt.Sprintf("%s/search-%d", place, round), home: n.dir + "/search-home", acked: map[string]int{}}
			if err := os.MkdirAll(m.data, 0o755); err != nil {
				t.Fatal(err)
			}
			m.start()
			m.createIndex()
			writers, readers := m.load()
			m.awaitLong("the node to be warm", m.process, func() bool { return m.writes.count() > 150 })
			m.writes.reset()
			m.reads.reset()
			const span = 20 * time.Second
			<-time.After(span)
			w, r := m.writes.count(), m.reads.count()
			writers.end()
			readers.end()
			t.Logf("%-6s %6.0f documents/s indexed, bulk of %d p50 %v p99 %v; %4.0f verified reads/s p50 %v p99 %v", map[bool]string{true: "ext4", false: "byokd"}[place == raw],
				float64(w*bulkDocs)/span.Seconds(), bulkDocs, m.writes.percentile(0.5).Round(100*time.Microsecond), m.writes.percentile(0.99).Round(100*time.Microsecond),
				float64(r)/span.Seconds(), m.reads.percentile(0.5).Round(100*time.Microsecond), m.reads.percentile(0.99).Round(100*time.Microsecond))
			m.process.signal(syscall.SIGTERM)
			m.process.wait(workloadPatience)
		}
	}
}
