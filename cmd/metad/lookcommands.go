package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/urfave/cli/v3"

	"metad/pkg/doctor"
)

// lookCommand returns a command that prints the running metad's answer at path.
func lookCommand[T any](stdout io.Writer, name, usage, path string,
	table func(io.Writer, T) error) *cli.Command {
	var runDir string
	out := &output{w: stdout}
	return &cli.Command{
		Name:  name,
		Usage: usage,
		Flags: append(out.flags(), runDirFlag(&runDir)),
		Action: func(ctx context.Context, _ *cli.Command) error {
			v, err := fetch[T](ctx, runDir, path)
			if err != nil {
				return err
			}
			return out.print(v, func(w io.Writer) error { return table(w, v) })
		},
	}
}

func mapCommand(stdout io.Writer) *cli.Command {
	return lookCommand(stdout, "map",
		"the kernel's map: which task has an address, and what it has sent", "/map",
		func(w io.Writer, entries []mapEntry) error {
			return printMap(w, entries, time.Now())
		})
}

func printMap(w io.Writer, entries []mapEntry, now time.Time) error {
	out := newTable(w, "ADDRESS", "TASK", "TAG", "DEVICE", "MAC", "PACKETS", "CONNECTIONS",
		"LAST SEEN")
	for _, e := range entries {
		seen := "never"
		if !e.LastSeen.IsZero() {
			seen = now.Sub(e.LastSeen).Round(time.Second).String() + " ago"
		}
		out.row(e.Address, e.Task, e.Tag,
			fmt.Sprintf("%s(%d)", cmp.Or(e.Device, "gone"), e.Ifindex), e.MAC,
			e.Packets, e.Connections, seen)
	}
	return out.print()
}

func explainCommand(stdout io.Writer) *cli.Command {
	var runDir string
	out := &output{w: stdout}
	return &cli.Command{
		Name: "explain",
		Usage: "everything between a container and its answer, step by step; " +
			"exit code 0: all is well, 1: warnings, 2: it is not answered",
		ArgsUsage: "<container or address>",
		Flags:     append(out.flags(), runDirFlag(&runDir)),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Len() != 1 || cmd.Args().First() == "" {
				return fmt.Errorf("explain: %w", errNothing)
			}
			report, err := fetch[doctor.Report](ctx, runDir,
				"/explain?what="+url.QueryEscape(cmd.Args().First()))
			if err != nil {
				return err
			}
			return out.report(report)
		},
	}
}

func eventsCommand(stdout io.Writer) *cli.Command {
	var runDir string
	var follow bool
	out := &output{w: stdout}
	return &cli.Command{
		Name: "events",
		Usage: "packets of unknown and refused sources, and the task whose port they " +
			"came by",
		Flags: append(out.flags(), runDirFlag(&runDir),
			&cli.BoolFlag{Name: "follow", Usage: "go on as they happen",
				Destination: &follow}),
		Action: func(ctx context.Context, _ *cli.Command) error {
			if follow {
				return printEvents(ctx, out, runDir, "/events?follow=1")
			}
			ctx, cancel := context.WithTimeout(ctx, answerTime)
			defer cancel()
			return printEvents(ctx, out, runDir, "/events")
		},
	}
}

// printEvents prints the events of path until they end, or the operator has seen enough.
func printEvents(ctx context.Context, out *output, runDir, path string) error {
	body, err := askSocket(ctx, runDir, path)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := json.NewDecoder(body)
	for {
		var e event
		switch err := lines.Decode(&e); {
		case errors.Is(ctx.Err(), context.Canceled) || err == io.EOF:
			return nil
		case err != nil:
			return unread(ctx, adminSocket(runDir), path, err)
		}
		err := out.next(e, func(w io.Writer) error { return printEvent(w, e) })
		if err != nil {
			return err
		}
	}
}

func printEvent(w io.Writer, e event) error {
	held := ""
	if e.HeldBack > 0 {
		held = fmt.Sprintf(" (and %d more)", e.HeldBack)
	}
	_, err := fmt.Fprintln(w, oneLine(fmt.Sprintf("%s %s from %s, MAC %s, at %s%s%s: %s",
		e.Time.Format(time.DateTime), e.Verdict, e.Addr, e.MAC, e.Device, of(e.Task), held,
		meanings[e.Verdict])))
	return err
}
