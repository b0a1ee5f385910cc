// Package mdfile owns the container metadata file: what stands in it, where it lies on the host and
// in the container, and how it is kept up to date.
//
// A container that has a file has a directory of its own on the host, which is bind-mounted
// read-only into the container. The directory is mounted and not the file, because a mount of a
// file pins its inode and a new version could then not be renamed over it.
package mdfile

import (
	"errors"
	"fmt"
	"strings"
)

// EnvVar is the variable that tells a process in the container where its file is.
const EnvVar = "ECS_CONTAINER_METADATA_FILE"

// Names of the file. FileName is the file, AgentFileName a symbolic link to it beside it, so that
// either name works on the host and in the container, whatever the Form.
const (
	FileName      = "metadata.json"
	AgentFileName = "ecs-container-metadata.json"
)

// ErrName is returned for a container name that cannot be a directory's name everywhere the
// directory is seen: on the host, in a bind, in the container.
var ErrName = errors.New("not usable as a directory name")

// ErrTaskARN is returned for a task ARN from which no directory can be made.
var ErrTaskARN = errors.New("malformed task ARN")

// Form chooses the path at which a container finds its file.
type Form int

const (
	// FormProposal is /ecs/metadata/<container name>/metadata.json.
	FormProposal Form = iota
	// FormAgent is /opt/ecs/metadata/<token>/ecs-container-metadata.json, as the ECS agent has
	// it.
	FormAgent
	// FormPrivate is /.metad/<token>/metadata.json: for a container whose mounts metad cannot
	// see, out of the way of any that it may have.
	FormPrivate
)

// ParseForm returns the Form named s: "proposal" or "agent".
func ParseForm(s string) (Form, error) {
	switch s {
	case "proposal":
		return FormProposal, nil
	case "agent":
		return FormAgent, nil
	}
	return 0, fmt.Errorf("metadata path form %q: want proposal or agent", s)
}

// Platform chooses the shape of paths. Nothing depends on the platform metad was built for, so both
// can be had (and tested) anywhere.
type Platform int

// Platforms.
const (
	Linux Platform = iota
	Windows
)

// Layout makes the paths of the metadata file. It is a value and all its methods are pure.
type Layout struct {
	Platform Platform
	Form     Form
	DataDir  string // of the host; see DefaultDataDir
}

// DefaultDataDir returns the data directory of the host. programData is the value of
// %ProgramData% and is used on Windows only.
func DefaultDataDir(p Platform, programData string) string {
	if p == Windows {
		return programData + `\Amazon\ECS\data`
	}
	return "/var/lib/ecs/data"
}

// Root returns the directory on the host beneath which all directories of tasks lie.
func (l Layout) Root() string { return l.join(l.DataDir, "metadata") }

// HostDir returns the directory on the host of the container whose directory below Root is rel,
// with forward slashes on every platform.
func (l Layout) HostDir(rel string) string {
	return l.join(l.Root(), strings.Split(rel, "/")...)
}

// Base returns the directory in the container that metad claims for itself. A container that mounts
// something of its own there, beneath it or over a parent of it does not get a file.
//
// For FormProposal it is /ecs, as the proposal says. The agent makes no such check; its directories
// carry random tokens, so what is claimed there is what lies above them.
func (l Layout) Base() string {
	switch {
	case l.Platform == Windows && l.Form == FormAgent:
		return `C:\ProgramData\Amazon\ECS\metadata`
	case l.Platform == Windows:
		return `C:\Amazon\ECS`
	case l.Form == FormAgent:
		return "/opt/ecs/metadata"
	case l.Form == FormPrivate:
		return "/.metad"
	}
	return "/ecs"
}

// ContainerDir returns the directory in the container: by its name for FormProposal, else by token.
func (l Layout) ContainerDir(name, token string) string {
	if l.Form == FormProposal {
		return l.join(l.Base(), "metadata", name)
	}
	return l.join(l.Base(), token)
}

// In returns the layout with another Form.
func (l Layout) In(form Form) Layout {
	l.Form = form
	return l
}

// File returns the path of the file in a directory that ContainerDir returned: the value of EnvVar.
func (l Layout) File(containerDir string) string {
	if l.Form == FormAgent {
		return l.join(containerDir, AgentFileName)
	}
	return l.join(containerDir, FileName)
}

func (l Layout) join(base string, elem ...string) string {
	sep := "/"
	if l.Platform == Windows {
		sep = `\`
	}
	return strings.TrimRight(base, sep) + sep + strings.Join(elem, sep)
}

// CheckName returns an error that is ErrName unless name can be used as one element of a path.
//
// What is allowed is what ECS and Docker allow in names: letters, digits, '_', '-', '.', and the
// '~' of the agent's internal names, 255 at most (NAME_MAX). It leaves no separators of any
// platform, no ':' to end a bind's source with, and nothing that a shell would not pass through.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("empty name: %w", ErrName)
	case len(name) > 255:
		return fmt.Errorf("name of %d bytes: %w", len(name), ErrName)
	case strings.Trim(name, ".") == "":
		return fmt.Errorf("%q: %w", name, ErrName)
	}
	for i := range len(name) {
		c := name[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '_', c == '-', c == '.', c == '~':
		default:
			return fmt.Errorf("%.80q: %w", name, ErrName)
		}
	}
	return nil
}

// safe returns the last element of name, an ARN or plain name, or "" if it cannot name a directory.
func safe(name string) string {
	name = name[strings.LastIndexByte(name, '/')+1:]
	if CheckName(name) != nil {
		return ""
	}
	return name
}

// TaskDir returns the directory of a task below Layout.Root: what follows the first slash of the
// ARN's resource. That is "<id>" for "…:task/<id>" and "<cluster>/<id>" for
// "…:task/<cluster>/<id>", as the agent has it. The error is ErrTaskARN.
func TaskDir(arn string) (string, error) {
	parts := strings.SplitN(arn, ":", 6)
	if len(parts) != 6 || parts[0] != "arn" {
		return "", fmt.Errorf("%.200q: %w", arn, ErrTaskARN)
	}
	kind, dir, ok := strings.Cut(parts[5], "/")
	elems := strings.Split(dir, "/")
	if !ok || kind != "task" || len(elems) > 2 {
		return "", fmt.Errorf("%.200q: %w", arn, ErrTaskARN)
	}
	for _, e := range elems {
		if err := CheckName(e); err != nil {
			return "", fmt.Errorf("%.200q: %w: %w", arn, ErrTaskARN, err)
		}
	}
	return dir, nil
}
