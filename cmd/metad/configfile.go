package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"
)

// configFile is the YAML file, read at the first look.
type configFile struct {
	path   string
	read   bool
	values map[string]string
	err    error
}

// load reads the file. A missing one is an error only if it was named.
func (f *configFile) load() {
	if f.read {
		return
	}
	f.read = true
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) && f.path == defaultConfigFile {
		return
	}
	if err != nil {
		f.err = fmt.Errorf("config: %w", err)
		return
	}
	f.values, f.err = parseConfig(b)
	if f.err != nil {
		f.err = fmt.Errorf("config %q: %w", f.path, f.err)
	}
}

// parseConfig returns the text of each key: a scalar's as it stands in the file, so that an account
// keeps its zeros and "off" is no boolean, and a list's with commas between. An error names the
// key and its line.
func parseConfig(b []byte) (map[string]string, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	values := map[string]string{}
	if doc.IsZero() || len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return values, nil // an empty file, or one of comments
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, errors.New("want the flags' names as keys")
	}
	known := map[string]bool{}
	for _, fl := range new(config).flags() {
		known[fl.Names()[0]] = fl.Names()[0] != "config"
	}
	var errs []error
	for i := 0; i+1 < len(root.Content); i += 2 {
		key := root.Content[i].Value
		value, err := textOf(root.Content[i+1])
		_, twice := values[key]
		line := root.Content[i].Line
		switch {
		case !known[key]:
			errs = append(errs, lineError{line, fmt.Errorf("unknown key %q", key)})
		case twice:
			errs = append(errs, lineError{line, fmt.Errorf("%s: given twice", key)})
		case err != nil:
			errs = append(errs, lineError{line, fmt.Errorf("%s: %w", key, err)})
		}
		values[key] = value
	}
	return values, errors.Join(errs...)
}

// lineError is an error in a line of the file, from 1.
type lineError struct {
	line int
	error
}

func (e lineError) Error() string { return fmt.Sprintf("line %d: %v", e.line, e.error) }
func (e lineError) Unwrap() error { return e.error }

// errEmpty: nothing after the colon could mean the default as well as none.
var errEmpty = errors.New(`empty; remove the key for the default, or say "off" where a flag can be`)

func textOf(n *yaml.Node) (string, error) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch {
	case n.Kind == yaml.ScalarNode && n.Value != "" && n.Tag != "!!null":
		return n.Value, nil
	case n.Kind == yaml.ScalarNode || n.Kind == yaml.SequenceNode && len(n.Content) == 0:
		return "", errEmpty
	case n.Kind != yaml.SequenceNode:
		return "", errors.New("want a value or a list")
	}
	parts := make([]string, len(n.Content))
	for i, c := range n.Content {
		var err error
		if parts[i], err = textOf(c); err != nil {
			return "", err
		}
	}
	return strings.Join(parts, ","), nil
}

// fileSource is one key of the file as a source of a flag's value.
type fileSource struct {
	file *configFile
	key  string
}

func (s *fileSource) Lookup() (string, bool) {
	s.file.load()
	v, ok := s.file.values[s.key]
	return v, ok
}
func (s *fileSource) String() string   { return "config file" }
func (s *fileSource) GoString() string { return "&fileSource{" + s.key + "}" }
