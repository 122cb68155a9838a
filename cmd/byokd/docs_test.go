package main

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestExampleConfiguration(t *testing.T) {
	c, warnings, err := loadConfig("../../deploy/byokd.yaml", nil)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("%v, %v", err, warnings)
	}
	if len(c.Keys) != 2 || c.Objects.Buckets["backups"].Key != "backup" {
		t.Errorf("%+v", c)
	}
}

// Every command of ours in the documents must exist, with its flags.
func TestDocumentedCommandsExist(t *testing.T) {
	documents, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	runbooks, err := filepath.Glob("../../docs/alerts/*.md")
	if err != nil {
		t.Fatal(err)
	}
	documents = append(documents, runbooks...)
	// In fenced blocks, lines; elsewhere, what stands in backquotes. FORMAT.md quotes bytes, not commands.
	fenced := regexp.MustCompile("(?ms)^```[a-z]*$.*?^```$")
	line := regexp.MustCompile(`(?m)^(?:bin/|kubectl exec .* -- )?byokd ([a-z].*)$`)
	inline := regexp.MustCompile("`(?:bin/)?byokd ([a-z][^`]*)`")
	found := 0
	for _, name := range append(documents, "../../README.md", "../../CHANGELOG.md", "../../deploy/run.sh") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(name) == "FORMAT.md" {
			continue
		}
		commands := inline.FindAllStringSubmatch(string(text), -1)
		for _, block := range fenced.FindAllString(string(text), -1) {
			commands = append(commands, line.FindAllStringSubmatch(block, -1)...)
		}
		for _, m := range commands {
			args, _, _ := strings.Cut(strings.TrimRight(m[1], "\\"), "#")
			args, _, _ = strings.Cut(args, ">")
			found++
			root := newCommand(nil)
			root.InitDefaultCompletionCmd()
			cmd, rest, err := root.Find(strings.Fields(args))
			if err == nil && cmd.HasParent() {
				err = cmd.ParseFlags(rest)
			}
			if err != nil && !errors.Is(err, pflag.ErrHelp) || !cmd.HasParent() {
				t.Errorf("%s: `byokd %s`: %v", name, args, err)
			}
		}
	}
	if found < 8 {
		t.Errorf("found %d commands only: the search is broken", found)
	}
}
