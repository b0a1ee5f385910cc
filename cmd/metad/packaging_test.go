package main

import (
	"os"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// composeService is metad in packaging/compose.yaml.
type composeService struct {
	Image       string
	Restart     string
	NetworkMode string `yaml:"network_mode"`
	PID         string
	Cgroup      string
	ReadOnly    bool     `yaml:"read_only"`
	CapDrop     []string `yaml:"cap_drop"`
	CapAdd      []string `yaml:"cap_add"`
	SecurityOpt []string `yaml:"security_opt"`
	Volumes     []string
}

// readCompose fails for a key of the service that a reader of composeService would overlook.
func readCompose(t *testing.T) composeService {
	t.Helper()
	f, err := os.Open("../../packaging/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var doc struct{ Services map[string]composeService }
	d := yaml.NewDecoder(f)
	d.KnownFields(true)
	if err := d.Decode(&doc); err != nil {
		t.Fatalf("compose.yaml: %v", err)
	}
	return doc.Services["metad"]
}

// runLine is `docker run` with the options of a service of Compose.
func runLine(s composeService) string {
	words := []string{"docker run -d --name metad", "--restart " + s.Restart,
		"--network " + s.NetworkMode, "--pid " + s.PID, "--cgroupns " + s.Cgroup,
		"--read-only"}
	for _, v := range s.CapDrop {
		words = append(words, "--cap-drop "+v)
	}
	for _, v := range s.CapAdd {
		words = append(words, "--cap-add "+v)
	}
	for _, v := range s.SecurityOpt {
		words = append(words, "--security-opt "+v)
	}
	for _, v := range s.Volumes {
		words = append(words, "-v "+v)
	}
	return strings.Join(append(words, "metad:VERSION"), " ")
}

// metad has the same capabilities under systemd, by Compose, and by the command on the page, which
// has all else of compose.yaml too.
func TestOneSetOfCapabilities(t *testing.T) {
	s := readCompose(t)
	text, err := os.ReadFile("../../packaging/metad.service")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nCapabilityBoundingSet=")
	line, _, _ := strings.Cut(rest, "\n")
	unit := strings.Fields(strings.ReplaceAll(line, "CAP_", ""))
	slices.Sort(unit)
	// CAP_SYS_ADMIN includes them (capabilities(7)), and Docker 20.10 may not know them.
	unit = slices.DeleteFunc(unit, func(c string) bool { return c == "BPF" || c == "PERFMON" })
	if !slices.Equal(s.CapAdd, unit) {
		t.Errorf("compose.yaml: got %v, want the unit's %v", s.CapAdd, unit)
	}
	page, err := os.ReadFile("../../docs/how-to/install.md")
	if err != nil {
		t.Fatal(err)
	}
	joined := strings.Join(strings.Fields(strings.ReplaceAll(string(page), "\\\n", " ")), " ")
	if want := runLine(s); !strings.Contains(joined, want) {
		t.Errorf("install.md does not have compose.yaml's options as a command:\n%s", want)
	}
}
