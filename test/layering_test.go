package test

import (
	"go/ast"
	"go/parser"
	"go/token"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/byokd/byokd"

// arrows says which packages of this module each package may import, outside tests. What is not listed
// is forbidden; a package that is not listed may not exist. docs/ARCHITECTURE.md draws the same picture.
var arrows = map[string][]string{
	".":                       {},
	"internal/seal":           {},
	"internal/durable":        {},
	"internal/volumeread":     {"internal/seal", "internal/durable"},
	"internal/control":        {},
	"internal/keypolicy":      {},
	"internal/awskey":         {"keyguard", "keyguard/awskms", "internal/keypolicy"},
	"keyguard":                {"internal/seal"},
	"keyguard/awskms":         {"keyguard", "internal/seal"},
	"keyguard/fleet":          {},
	"internal/connlimit":      {},
	"internal/fusemount":      {},
	"internal/handover":       {},
	"internal/csinode":        {"internal/durable", "internal/fusemount", "internal/handover"},
	"internal/keeper":         {},
	"internal/keeper/oomtest": {anything},
	"keyguard/kmstest":        {anything},
	"fs":                      {"keyguard", "internal/seal", "internal/durable", "internal/fusemount"},
	"fs/lowertest":            {anything},
	"objstore":                {"keyguard", "internal/seal", "internal/connlimit"},
	"objstore/s3test":         {anything},
	"metrics":                 {"keyguard", "fs", "objstore", "internal/inject"},
	"internal/inject":         {},
	"cmd/byokd": {"metrics", "fs", "objstore", "keyguard", "keyguard/awskms", "keyguard/fleet", "internal/seal", "internal/durable", "internal/control",
		"internal/keypolicy", "internal/awskey", "internal/volumeread", "internal/connlimit", "internal/inject", "internal/keeper",
		"internal/fusemount", "internal/handover", "internal/csinode", "deploy/seccomp"},
	"cmd/devcloud":       {"keyguard/kmstest", "internal/durable"},
	"bench":              {anything},
	"test":               {anything},
	"test/powercut":      {anything},
	"test/summary":       {anything},
	"test/clients/minio": {anything},
	"test/chart":         {anything}, // a module of its own
	"deploy/image":       {anything}, // the same
	"deploy/seccomp":     {},
	"test/kube":          {anything},
}

// anything is for packages of tests, which nothing but tests imports.
const anything = "*"

// outside says which packages from elsewhere only the named packages may import.
var outside = map[string][]string{
	"github.com/hanwen/go-fuse":              {"fs"},
	"github.com/prometheus":                  {"metrics", "cmd/byokd"},
	"github.com/aws":                         {"keyguard/awskms", "internal/awskey", "objstore", "cmd/byokd", "cmd/devcloud"},
	"github.com/versity":                     {"cmd/devcloud"},
	"github.com/spf13/cobra":                 {"cmd/byokd", "cmd/devcloud"},
	"github.com/goccy/go-yaml":               {"cmd/byokd"},
	"maragu.dev/gomponents":                  {"metrics"},
	"github.com/tink-crypto":                 {"internal/seal"},
	"go.uber.org/zap":                        {"keyguard", "keyguard/fleet", "fs", "objstore", "metrics", "cmd/byokd", "cmd/devcloud", "internal/control", "internal/keeper", "internal/inject", "internal/handover", "internal/csinode"},
	"k8s.io":                                 {"internal/inject", "cmd/byokd"},
	"sigs.k8s.io":                            {"internal/inject"},
	"google.golang.org/grpc":                 {"internal/csinode"},
	"github.com/container-storage-interface": {"internal/csinode"},
	"runtime/secret":                         {"internal/seal"},
	"crypto/aes":                             {"internal/seal"},
	"crypto/cipher":                          {"internal/seal"},
	"crypto/hkdf":                            {"internal/seal"},
	"flag":                                   {},
	"github.com/aws/aws-sdk-go-v2/config":    {"cmd/byokd", "cmd/devcloud"},
}

// source is one file of the program (not of its tests).
type source struct {
	pkg  string // path below the module, "." for the root
	name string
	file *ast.File
	set  *token.FileSet
}

// sources parses every Go file of the module outside tests.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir("..", func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != ".." && (strings.HasPrefix(name, ".") || slices.Contains([]string{"testdata", "run", "bin"}, name)) {
				return iofs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel("..", filepath.Dir(path))
		all = append(all, source{filepath.ToSlash(pkg), path, file, set})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 50 {
		t.Fatalf("found %d source files only: the walk is broken", len(all))
	}
	return all
}

func TestImportArrows(t *testing.T) {
	for _, s := range sources(t) {
		allowed, listed := arrows[s.pkg]
		if !listed {
			t.Errorf("%s: package %s has no row in the table of arrows", s.name, s.pkg)
			continue
		}
		if slices.Contains(allowed, anything) {
			continue
		}
		for _, spec := range s.file.Imports {
			path := strings.Trim(spec.Path.Value, `"`)
			if inner, ok := strings.CutPrefix(path, module+"/"); ok && !slices.Contains(allowed, inner) {
				t.Errorf("%s: %s may not import %s", s.name, s.pkg, inner)
			}
			if s.pkg == "." {
				continue
			}
			for prefix, users := range outside {
				if (path == prefix || strings.HasPrefix(path, prefix+"/")) && !slices.Contains(users, s.pkg) {
					t.Errorf("%s: %s may not import %s; only %v may", s.name, s.pkg, path, users)
				}
			}
			if s.pkg == "internal/seal" && strings.Contains(path, ".") && !strings.HasPrefix(path, "github.com/tink-crypto/tink-go/v2/daead/subtle") {
				t.Errorf("%s: the formats stand on the standard library and AES-SIV only, not on %s", s.name, path)
			}
		}
	}
}

// A cipher that outlives its pass would outlive a freeze: no struct of fs or objstore may have a field
// that holds one, whether directly, by pointer, in a slice, a map, a channel or a generic container.
func TestNothingHoldsACipher(t *testing.T) {
	for _, s := range sources(t) {
		if s.pkg != "fs" && s.pkg != "objstore" {
			continue
		}
		for _, held := range heldCiphers(s.file) {
			t.Errorf("%s: a struct holds a cipher or a key; take it from Pass.Keys each time", s.set.Position(held))
		}
	}
}

// heldCiphers finds the struct fields of a file that can keep a cipher or a key.
func heldCiphers(file *ast.File) (at []token.Pos) {
	holders := map[string][]string{"seal": {"Root", "FileCipher", "ObjectCipher"}, "keyguard": {"Keys"}, "cipher": {"AEAD", "Block", "Stream"}}
	ast.Inspect(file, func(n ast.Node) bool {
		structure, ok := n.(*ast.StructType)
		if !ok {
			return true
		}
		for _, field := range structure.Fields.List {
			ast.Inspect(field.Type, func(n ast.Node) bool {
				if _, function := n.(*ast.FuncType); function {
					return false // a parameter is no possession
				}
				if selected, ok := n.(*ast.SelectorExpr); ok {
					if from, ok := selected.X.(*ast.Ident); ok && slices.Contains(holders[from.Name], selected.Sel.Name) {
						at = append(at, field.Pos())
					}
				}
				return true
			})
		}
		return true
	})
	return at
}

func TestHeldCiphersAreFound(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "x.go", `package fs
type a struct { c *seal.FileCipher }
type b struct { m map[int][]*seal.Root; k keyguard.Keys }
type c struct { p atomic.Pointer[cipher.AEAD]; inner struct { ch chan *seal.ObjectCipher } }
type fine struct { f func(*seal.Root) error; id seal.FileID; pass keyguard.Pass }
`, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The inner struct of c is met twice, as a field and by itself.
	if found := heldCiphers(file); len(found) != 6 {
		t.Errorf("found %d fields, want 6: %v", len(found), found)
	}
}

// Flags, environment and exits belong to cmd; elsewhere they would be inputs and ends that no test sees.
func TestOnlyCommandsReadTheirSurroundings(t *testing.T) {
	forbidden := map[string][]string{"os": {"Exit", "Getenv", "LookupEnv", "Environ", "Args"}, "log": {"Fatal", "Fatalf", "Fatalln", "Printf", "Println"}}
	for _, s := range sources(t) {
		if strings.HasPrefix(s.pkg, "cmd/") || slices.Contains(arrows[s.pkg], anything) {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			selected, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if from, ok := selected.X.(*ast.Ident); ok && slices.Contains(forbidden[from.Name], selected.Sel.Name) {
				t.Errorf("%s: %s.%s belongs to cmd", s.set.Position(selected.Pos()), from.Name, selected.Sel.Name)
			}
			return true
		})
	}
}

// Two daemons must be able to run in one process: no init functions, and package variables are constants
// in all but name. Those that are never assigned to again are allowed.
func TestNoMutablePackageState(t *testing.T) {
	variables := map[string]map[string]bool{} // package → names
	files := sources(t)
	for _, s := range files {
		for _, decl := range s.file.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.Name == "init" {
					t.Errorf("%s: init runs before anybody asked for it", s.set.Position(d.Pos()))
				}
			case *ast.GenDecl:
				if d.Tok != token.VAR {
					continue
				}
				for _, spec := range d.Specs {
					for _, name := range spec.(*ast.ValueSpec).Names {
						if name.Name != "_" {
							if variables[s.pkg] == nil {
								variables[s.pkg] = map[string]bool{}
							}
							variables[s.pkg][name.Name] = true
						}
					}
				}
			}
		}
	}
	for _, s := range files {
		ast.Inspect(s.file, func(n ast.Node) bool {
			assign, ok := n.(*ast.AssignStmt)
			if !ok || assign.Tok == token.DEFINE {
				return true
			}
			for _, left := range assign.Lhs {
				// By name alone: a local variable that shadows a package variable is told too, and better renamed.
				if name, ok := left.(*ast.Ident); ok && variables[s.pkg][name.Name] {
					t.Errorf("%s: the package variable %s is assigned to", s.set.Position(name.Pos()), name.Name)
				}
			}
			return true
		})
	}
}

// Names that say nothing attract code that belongs elsewhere.
func TestForbiddenNames(t *testing.T) {
	words := []string{"util", "utils", "common", "helper", "helpers", "manager", "base", "misc"}
	for _, s := range sources(t) {
		file := strings.TrimSuffix(filepath.Base(s.name), ".go")
		if slices.Contains(words, file) || slices.Contains(words, filepath.Base(s.pkg)) {
			t.Errorf("%s: a name that says nothing", s.name)
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.TypeSpec); ok {
				lower := strings.ToLower(spec.Name.Name)
				for _, w := range words {
					if lower == w || w != "base" && strings.HasSuffix(lower, w) {
						t.Errorf("%s: type %s: a name that says nothing", s.set.Position(spec.Pos()), spec.Name.Name)
					}
				}
			}
			return true
		})
	}
}

// Every package says its job, guarantees and ordering rules in doc.go (commands: in main.go).
func TestEveryPackageHasItsDoc(t *testing.T) {
	documented := map[string]bool{}
	packages := map[string]bool{}
	for _, s := range sources(t) {
		if s.pkg == "." {
			continue
		}
		packages[s.pkg] = true
		name := filepath.Base(s.name)
		if s.file.Doc != nil && (name == "doc.go" || s.file.Name.Name == "main" && name == "main.go") {
			documented[s.pkg] = true
		}
	}
	for p := range packages {
		if !documented[p] {
			t.Errorf("package %s has no package comment in doc.go", p)
		}
	}
	if _, err := os.Stat("../docs/ARCHITECTURE.md"); err != nil {
		t.Error(err)
	}
}
