package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// readCredentials reads the file of ACCESS_KEY_ID:SECRET_ACCESS_KEY lines with which clients of the S3
// proxy sign. A file that everybody may read is refused: the secret would be none.
func readCredentials(name string) (map[string]string, error) {
	text, err := readPrivate("objects.credentials.file", name)
	if err != nil {
		return nil, err
	}
	keys, err := parseCredentials(string(text))
	if err != nil {
		return nil, fmt.Errorf("objects.credentials.file: %s: %w", name, err)
	}
	return keys, nil
}

// readPrivate reads a file with a secret, named by a field of the configuration.
func readPrivate(field, name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	if info.Mode().Perm()&0o004 != 0 {
		return nil, fmt.Errorf("%s: everybody may read %s; type: chmod 600 %s", field, name, name)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return text, nil
}

// parseCredentials reads the text of such a file. Errors name the line, never its content.
func parseCredentials(text string) (map[string]string, error) {
	keys := map[string]string{}
	number := 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		id, secret, ok := strings.Cut(line, ":")
		if !ok || id == "" || secret == "" || strings.ContainsAny(line, " \t") {
			return nil, fmt.Errorf("line %d is not ACCESS_KEY_ID:SECRET_ACCESS_KEY", number)
		}
		if _, twice := keys[id]; twice {
			return nil, fmt.Errorf("line %d gives an access key id for the second time", number)
		}
		keys[id] = secret
	}
	if len(keys) == 0 {
		return nil, errors.New("no credentials in it; write one line ACCESS_KEY_ID:SECRET_ACCESS_KEY")
	}
	return keys, nil
}
