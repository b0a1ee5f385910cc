package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v3"

	"metad/pkg/loader"
)

// build says what this program is.
type build struct {
	Version string
	Commit  string // "unknown" if it was not built in a clone
	Go      string
	// Layout is the version of the pinned maps: a metad does not use maps of another.
	Layout   uint32
	Platform string
}

func thisBuild() (build, error) {
	layout, err := loader.LayoutVersion()
	b := build{Version: version, Commit: "unknown", Go: runtime.Version(), Layout: layout,
		Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.Commit = cmp.Or(s.Value, b.Commit)
			}
		}
	}
	return b, err
}

func versionCommand(stdout io.Writer) *cli.Command {
	out := &output{w: stdout}
	return &cli.Command{
		Name: "version",
		Usage: "print the version, the commit, Go's version and the layout of the pinned " +
			"maps",
		Flags:  out.flags(),
		Action: func(context.Context, *cli.Command) error { return printVersion(out) },
	}
}

func printVersion(out *output) error {
	b, err := thisBuild()
	if err != nil {
		return err
	}
	return out.print(b, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "metad %s\ncommit %s\n%s %s\nmap layout %d\n", b.Version,
			b.Commit, b.Go, b.Platform, b.Layout)
		return err
	})
}
