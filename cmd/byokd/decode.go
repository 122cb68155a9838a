package main

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// problem is one fault of a configuration, in words for the person who wrote it.
type problem struct {
	file string // name of the file, empty for the environment
	line int    // 0 when the fault has no line: something is missing, or came from the environment
	path string // path of the field, such as keys.primary.arn
	text string
}

func (p problem) String() string {
	var b strings.Builder
	if p.line > 0 {
		fmt.Fprintf(&b, "%s:%d: ", p.file, p.line)
	} else if p.file != "" {
		fmt.Fprintf(&b, "%s: ", p.file)
	}
	if p.path != "" {
		b.WriteString(p.path + ": ")
	}
	b.WriteString(p.text)
	return b.String()
}

// configError is everything that is wrong with a configuration, at once.
type configError struct{ problems []problem }

func (e *configError) Error() string {
	lines := make([]string, len(e.problems))
	for i, p := range e.problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// loadConfig reads, overrides from the environment, completes and checks the configuration. The error
// is a *configError unless the file cannot be read.
func loadConfig(name string, environ []string) (Config, []string, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return Config{}, nil, fmt.Errorf("the configuration cannot be read: %w", err)
	}
	return parseConfig(name, text, environ)
}

// parseConfig is loadConfig on the text of a file. The strings returned are warnings.
func parseConfig(name string, text []byte, environ []string) (Config, []string, error) {
	d := decoder{file: name, lines: map[string]int{}}
	var c Config
	d.document(text, reflect.ValueOf(&c).Elem())
	warnings := d.environment(environ, reflect.ValueOf(&c).Elem())
	c = c.withDefaults()
	if len(d.problems) == 0 {
		// Faults of the text hide or cause faults of the values: tell those first.
		for _, p := range c.validate() {
			p.file, p.line = name, d.lineOf(p.path)
			d.problems = append(d.problems, p)
		}
	}
	if len(d.problems) > 0 {
		return Config{}, warnings, &configError{d.problems}
	}
	return c, warnings, nil
}

// decoder fills a Config from YAML and collects every fault instead of stopping at the first.
type decoder struct {
	file     string
	lines    map[string]int // where each field stood, by path
	problems []problem
}

func (d *decoder) add(line int, path, format string, args ...any) {
	d.problems = append(d.problems, problem{file: d.file, line: line, path: path, text: fmt.Sprintf(format, args...)})
}

// lineOf returns the line of path, or of the nearest level above it that has one.
func (d *decoder) lineOf(path string) int {
	for path != "" {
		if line, ok := d.lines[path]; ok {
			return line
		}
		path = path[:max(strings.LastIndexByte(path, '.'), 0)]
	}
	return 0
}

func (d *decoder) document(text []byte, into reflect.Value) {
	file, err := parser.ParseBytes(text, 0)
	if err != nil {
		d.syntax(err)
		return
	}
	docs := 0
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.CommentType || doc.Body.Type() == ast.NullType {
			continue
		}
		if docs++; docs > 1 {
			d.add(doc.Body.GetToken().Position.Line, "", "a second document: the configuration is one document")
			return
		}
		d.value(doc.Body, into, "")
	}
}

// syntax tells a YAML error with its line; the library prefixes "[line:column] ".
func (d *decoder) syntax(err error) {
	text, line := strings.SplitN(err.Error(), "\n", 2)[0], 0
	if rest, ok := strings.CutPrefix(text, "["); ok {
		if at, message, ok := strings.Cut(rest, "] "); ok {
			number, _, _ := strings.Cut(at, ":")
			if n, err := strconv.Atoi(number); err == nil {
				line, text = n, message
			}
		}
	}
	d.add(line, "", "not YAML: %s", text)
}

func (d *decoder) value(node ast.Node, into reflect.Value, path string) {
	line := node.GetToken().Position.Line
	if _, given := d.lines[path]; !given {
		d.lines[path] = line
	}
	switch n := node.(type) {
	case *ast.NullNode:
		return // the same as left out
	case *ast.AnchorNode, *ast.AliasNode, *ast.TagNode:
		d.add(line, path, "anchors, aliases and tags are not understood here: write the value out")
		return
	case *ast.SequenceNode:
		d.sequence(n, into, path)
		return
	}
	if _, scalar := into.Addr().Interface().(interface{ parse(string) error }); scalar || isScalar(into.Kind()) {
		d.scalar(node, into, path)
		return
	}
	if into.Kind() == reflect.Slice {
		d.add(line, path, "a list is expected, such as [one, two]")
		return
	}
	entries, ok := entriesOf(node)
	if !ok {
		d.add(line, path, "fields are expected below it, not %q", node.String())
		return
	}
	if into.Kind() == reflect.Pointer {
		into.Set(reflect.New(into.Type().Elem()))
		into = into.Elem()
	}
	d.mapping(entries, into, path)
}

func isScalar(k reflect.Kind) bool { return k == reflect.String || k == reflect.Bool }

func entriesOf(node ast.Node) ([]*ast.MappingValueNode, bool) {
	switch n := node.(type) {
	case *ast.MappingNode:
		return n.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}, true
	}
	return nil, false
}

func (d *decoder) mapping(entries []*ast.MappingValueNode, into reflect.Value, path string) {
	fields := fieldsOf(into.Type())
	for _, entry := range entries {
		token := entry.Key.GetToken()
		name, at := token.Value, join(path, token.Value)
		d.lines[at] = token.Position.Line
		if into.Kind() == reflect.Map {
			if into.IsNil() {
				into.Set(reflect.MakeMap(into.Type()))
			}
			element := reflect.New(into.Type().Elem()).Elem()
			d.value(entry.Value, element, at)
			into.SetMapIndex(reflect.ValueOf(name), element)
			continue
		}
		index, known := fields[name]
		if !known {
			d.add(token.Position.Line, at, "unknown field%s", hint(name, fields))
			continue
		}
		d.value(entry.Value, into.Field(index), at)
	}
}

func (d *decoder) sequence(n *ast.SequenceNode, into reflect.Value, path string) {
	if into.Kind() != reflect.Slice {
		d.add(n.GetToken().Position.Line, path, "a list is not expected here")
		return
	}
	for i, item := range n.Values {
		element := reflect.New(into.Type().Elem()).Elem()
		d.scalar(item, element, fmt.Sprintf("%s[%d]", path, i))
		into.Set(reflect.Append(into, element))
	}
}

func (d *decoder) scalar(node ast.Node, into reflect.Value, path string) {
	line := node.GetToken().Position.Line
	if _, ok := node.(ast.ScalarNode); !ok {
		d.add(line, path, "a single value is expected, not fields or a list")
		return
	}
	text := node.GetToken().Value
	if literal, ok := node.(*ast.LiteralNode); ok {
		text = literal.Value.Value
	}
	if err := setScalar(into, text); err != nil {
		d.add(line, path, "%q is %v", text, err)
	}
}

var errBool = errors.New("neither true nor false")

func setScalar(into reflect.Value, text string) error {
	if p, ok := into.Addr().Interface().(interface{ parse(string) error }); ok {
		return p.parse(text)
	}
	switch into.Kind() {
	case reflect.Bool:
		if text != "true" && text != "false" {
			return errBool
		}
		into.SetBool(text == "true")
	case reflect.String:
		into.SetString(text)
	case reflect.Slice: // from the environment: separated by commas
		for item := range strings.SplitSeq(text, ",") {
			into.Set(reflect.Append(into, reflect.ValueOf(strings.TrimSpace(item))))
		}
	default:
		panic("a kind of field that the decoder does not know: " + into.Type().String())
	}
	return nil
}

// fieldsOf returns the YAML names of a struct's fields with their indices; none for other types.
func fieldsOf(t reflect.Type) map[string]int {
	if t.Kind() != reflect.Struct {
		return nil
	}
	fields := make(map[string]int, t.NumField())
	for i := range t.NumField() {
		if name := t.Field(i).Tag.Get("yaml"); name != "" {
			fields[name] = i
		}
	}
	return fields
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// hint names the field that was most likely meant, or all there are when nothing is near.
func hint(name string, fields map[string]int) string {
	names := make([]string, 0, len(fields))
	for f := range fields {
		names = append(names, f)
	}
	sort.Strings(names)
	best, distance := "", 1+len(name)/3 // a third of the letters may be wrong
	for _, f := range names {
		if n := editDistance(strings.ToLower(name), strings.ToLower(f)); n <= distance {
			best, distance = f, n-1
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %s?", best)
	}
	return "; known here: " + strings.Join(names, ", ")
}

// editDistance counts the insertions, deletions and substitutions between a and b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			substitute := diagonal
			if a[i-1] != b[j-1] {
				substitute++
			}
			diagonal = row[j]
			row[j] = min(substitute, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}

// envName turns a path into the name of the variable that overrides it.
func envName(path string) string {
	var b strings.Builder
	b.WriteString("BYOKD_")
	previous := rune(0)
	for _, r := range path {
		switch {
		case r == '.' || r == '-':
			r = '_'
		case unicode.IsUpper(r) && unicode.IsLower(previous):
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToUpper(r))
		previous = r
	}
	return b.String()
}
