package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"
)

const (
	assets = "../../.cache/kube"
	base   = "../../deploy/kustomize/base"
	image  = "ghcr.io/byokd/byokd:v1.2.3"

	// patience is how long anything may take on a busy machine before it counts as never.
	patience = 90 * time.Second
)

// kube is the API server of all tests, with byokd's manifests in it.
type kube struct {
	environment *envtest.Environment
	config      *rest.Config // of an administrator
	client      client.Client
	clients     *kubernetes.Clientset
	program     string // byokd
	dir         string
	err         error
}

var start = sync.OnceValue(startKube)

// running is what start has started, if anything.
var running *kube

func TestMain(m *testing.M) {
	code := m.Run()
	if running != nil {
		if err := running.stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(code)
}

// available tells what is missing.
func available() string {
	for _, name := range []string{"kube-apiserver", "etcd"} {
		if _, err := os.Stat(filepath.Join(assets, name)); err != nil {
			return name + " is not there (test/kube/prepare.sh makes it)"
		}
	}
	return ""
}

// cluster returns the API server, or skips the test.
func cluster(t *testing.T) *kube {
	t.Helper()
	skipFor(t, available())
	k := start()
	if k.err != nil {
		t.Fatal(k.err)
	}
	return k
}

// skipFor skips the test where something is missing, or fails it where that has to be there.
func skipFor(t *testing.T, missing string) {
	t.Helper()
	if missing == "" {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "kube") {
		t.Fatal(missing)
	}
	t.Skip(missing)
}

func startKube() *kube {
	running = &kube{}
	running.err = running.start()
	return running
}

func (k *kube) start() error {
	if err := k.boot(); err != nil {
		return err
	}
	return k.install()
}

// boot builds byokd and starts an API server with nothing of byokd in it.
func (k *kube) boot(flags ...string) (err error) {
	if k.dir, err = os.MkdirTemp("", "byokd-kube"); err != nil {
		return err
	}
	k.program = filepath.Join(k.dir, "byokd")
	if out, err := exec.Command("go", "-C", "../..", "build", "-o", k.program, "./cmd/byokd").CombinedOutput(); err != nil {
		return fmt.Errorf("byokd cannot be built: %w\n%s", err, out)
	}
	binaries, err := filepath.Abs(assets)
	if err != nil {
		return err
	}
	environment := &envtest.Environment{BinaryAssetsDirectory: binaries, ControlPlaneStartTimeout: patience, ControlPlaneStopTimeout: patience}
	arguments := environment.ControlPlane.GetAPIServer().Configure().Append("allow-privileged", "true")
	for _, flag := range flags {
		arguments.Append(flag, "true")
	}
	if k.config, err = environment.Start(); err != nil {
		return err
	}
	k.environment = environment
	k.config.QPS, k.config.Burst = 200, 400
	if k.client, err = client.New(k.config, client.Options{}); err != nil {
		return err
	}
	k.clients, err = kubernetes.NewForConfig(k.config)
	return err
}

// stop ends the API server.
func (k *kube) stop() error {
	if k.environment == nil {
		return nil
	}
	return errors.Join(k.environment.Stop(), os.RemoveAll(k.dir))
}

// install applies the manifests as they are, with fields that the API server does not know refused.
func (k *kube) install() error {
	files, err := filepath.Glob(filepath.Join(base, "*.yaml"))
	if err != nil {
		return err
	}
	var objects []*unstructured.Unstructured
	for _, file := range files {
		if filepath.Base(file) == "kustomization.yaml" {
			continue
		}
		found, err := readObjects(file)
		if err != nil {
			return err
		}
		objects = append(objects, found...)
	}
	slices.SortStableFunc(objects, func(a, b *unstructured.Unstructured) int { // what others lie in first
		first := func(o *unstructured.Unstructured) int {
			if o.GetKind() == "Namespace" {
				return 0
			}
			return 1
		}
		return first(a) - first(b)
	})
	strict := client.WithFieldValidation(k.client, metav1.FieldValidationStrict)
	for _, o := range objects {
		if err := strict.Create(context.Background(), o); err != nil {
			return fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err)
		}
	}
	return nil
}

func readObjects(file string) (objects []*unstructured.Unstructured, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseObjects(text)
}

func parseObjects(text []byte) (objects []*unstructured.Unstructured, err error) {
	for document := range strings.SplitSeq("\n"+string(text), "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(document), &o.Object); err != nil {
			return nil, err
		}
		if len(o.Object) > 0 {
			objects = append(objects, o)
		}
	}
	return objects, nil
}

// kubeconfig writes one with the rights of byokd's service account.
func (k *kube) kubeconfig(t *testing.T) string {
	t.Helper()
	return k.kubeconfigOf(t, "byokd-inject")
}

// kubeconfigOf writes one with the rights of a service account beside byokd's.
func (k *kube) kubeconfigOf(t *testing.T, account string) string {
	t.Helper()
	token, err := k.clients.CoreV1().ServiceAccounts("byokd-system").CreateToken(t.Context(), account, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: k.config.Host, CertificateAuthorityData: k.config.CAData}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: token.Status.Token}
	config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "x"
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// injector is a running `byokd inject`.
type injector struct {
	cmd            *exec.Cmd
	webhook, admin string // addresses
	ended          chan struct{}
}

// inject starts an injector, points the webhook at it, and waits until API server and injector trust each other. It is
// stopped at the end of the test.
func (k *kube) inject(t *testing.T) *injector {
	t.Helper()
	i := k.startInjector(t)
	k.pointAt(t, i)
	return i
}

func (k *kube) startInjector(t *testing.T) *injector {
	t.Helper()
	return k.runInjector(t, "--kubeconfig", k.kubeconfig(t), "--listen", "127.0.0.1:0", "--name", "127.0.0.1", "--image", image)
}

// runInjector starts one and waits until it has its certificate.
func (k *kube) runInjector(t *testing.T, args ...string) *injector {
	t.Helper()
	i := &injector{ended: make(chan struct{})}
	i.cmd = exec.Command(k.program, append(append([]string{"inject"}, args...), "--admin-listen", "127.0.0.1:0")...)
	log, err := i.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := i.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.stop(t) })
	started := make(chan bool, 1)
	go i.follow(log, started, t)
	select {
	case ok := <-started:
		if !ok {
			t.Fatal("byokd inject ended before it had begun")
		}
	case <-time.After(patience):
		t.Fatal("byokd inject does not begin")
	}
	until(t, "the injector is ready", func() bool { status, _ := ask("http://" + i.admin + "/readyz"); return status == http.StatusOK })
	return i
}

// follow reads the log until the process ends.
func (i *injector) follow(log io.Reader, started chan<- bool, t *testing.T) {
	defer close(i.ended)
	defer close(started)
	decoder := json.NewDecoder(log)
	for {
		var line struct{ Level, Msg, Webhook, Admin, Error string }
		if decoder.Decode(&line) != nil {
			return
		}
		if line.Msg == "started" {
			i.webhook, i.admin = line.Webhook, line.Admin
			started <- true
		}
		if line.Level == "error" || line.Level == "warn" {
			t.Logf("injector: %s: %s", line.Msg, line.Error)
		}
	}
}

func (i *injector) stop(t *testing.T) {
	t.Helper()
	if i.cmd.ProcessState != nil {
		return
	}
	if err := i.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	<-i.ended
	if err := i.cmd.Wait(); err != nil {
		t.Errorf("byokd inject: %v", err)
	}
}

// pointAt makes the webhook call this injector: here is no Service.
func (k *kube) pointAt(t *testing.T, i *injector) {
	t.Helper()
	patch := fmt.Sprintf(`[{"op":"add","path":"/webhooks/0/clientConfig/url","value":"https://%s/inject"},{"op":"remove","path":"/webhooks/0/clientConfig/service"}]`, i.webhook)
	if k.webhookURL(t) != "" {
		patch = fmt.Sprintf(`[{"op":"replace","path":"/webhooks/0/clientConfig/url","value":"https://%s/inject"}]`, i.webhook)
	}
	_, err := k.clients.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(t.Context(), "byokd-inject", types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	namespace := k.namespace(t, "")
	until(t, "the API server asks the injector", func() bool {
		return k.try(t, podIn(namespace)) == nil
	})
}

func (k *kube) webhookURL(t *testing.T) string {
	t.Helper()
	c, err := k.clients.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), "byokd-inject", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if url := c.Webhooks[0].ClientConfig.URL; url != nil {
		return *url
	}
	return ""
}

// namespace makes one, with a level of Pod Security where it is given.
func (k *kube) namespace(t *testing.T, enforce string) string {
	t.Helper()
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}
	if enforce != "" {
		n.Labels = map[string]string{"pod-security.kubernetes.io/enforce": enforce}
	}
	if err := k.client.Create(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	return n.Name
}

// try creates a pod by dry run.
func (k *kube) try(t *testing.T, p *corev1.Pod) error {
	t.Helper()
	return k.client.Create(t.Context(), p.DeepCopy(), client.DryRunAll)
}

// create creates a pod and returns it as it came out, with the warnings that a client is told.
func (k *kube) create(t *testing.T, p *corev1.Pod) (*corev1.Pod, []string, error) {
	t.Helper()
	heard := &warnings{}
	config := rest.CopyConfig(k.config)
	config.WarningHandler = heard
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	out, err := clients.CoreV1().Pods(p.Namespace).Create(t.Context(), p, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
	return out, heard.all, err
}

// mustCreate is create for pods that have to pass.
func (k *kube) mustCreate(t *testing.T, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	out, _, err := k.create(t, p)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

type warnings struct{ all []string }

func (w *warnings) HandleWarningHeader(_ int, _ string, text string) { w.all = append(w.all, text) }

// podIn is a pod that byokd can be put into, and that Pod Security lets into every namespace.
func podIn(namespace string, edits ...func(*corev1.Pod)) *corev1.Pod {
	yes, no, user := true, false, int64(1000)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "db-0", Namespace: namespace, Labels: map[string]string{"byokd.io/inject": "true"}, Annotations: map[string]string{}},
		Spec: corev1.PodSpec{
			SecurityContext: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
			Containers: []corev1.Container{{Name: "db", Image: "db:1",
				SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
				VolumeMounts:    []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}}},
			Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data-db-0"}}}},
		},
	}
	for _, edit := range edits {
		edit(p)
	}
	return p
}

// render puts byokd into a pod offline.
func (k *kube) render(t *testing.T, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	p = p.DeepCopy()
	p.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	in, err := yaml.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	out := &corev1.Pod{}
	if err := yaml.UnmarshalStrict(k.renderText(t, string(in)), out); err != nil {
		t.Fatal(err)
	}
	return out
}

func (k *kube) renderText(t *testing.T, in string) []byte {
	t.Helper()
	var said strings.Builder
	cmd := exec.Command(k.program, "render", "-f", "-", "--image", image, "--restart-all-containers", "on")
	cmd.Stdin, cmd.Stderr = strings.NewReader(in), &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
	return out
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ask returns status and body; 0 when nobody answers.
func ask(url string) (int, string) {
	answer, err := http.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return 0, err.Error()
	}
	return answer.StatusCode, string(body)
}
