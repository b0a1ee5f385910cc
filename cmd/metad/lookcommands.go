package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"metad/pkg/doctor"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(printable{w})
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func mapCommand(stdout io.Writer) *cli.Command {
	var runDir string
	var asJSON bool
	return &cli.Command{
		Name:  "map",
		Usage: "the kernel's map: which task has an address, and what it has sent",
		Flags: []cli.Flag{
			runDirFlag(&runDir),
			jsonFlag(&asJSON),
		},
		Action: func(ctx context.Context, _ *cli.Command) error {
			entries, err := fetch[[]mapEntry](ctx, runDir, "/map")
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(stdout, entries)
			}
			return printMap(stdout, entries, time.Now())
		},
	}
}

func printMap(w io.Writer, entries []mapEntry, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "ADDRESS\tTASK\tTAG\tDEVICE\tMAC\tPACKETS\tCONNECTIONS\tLAST SEEN")
	for _, e := range entries {
		seen := "never"
		if !e.LastSeen.IsZero() {
			seen = now.Sub(e.LastSeen).Round(time.Second).String() + " ago"
		}
		device := e.Device
		if device == "" {
			device = "gone"
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%s(%d)\t%s\t%d\t%d\t%s\n", e.Address, oneLine(e.Task),
			e.Tag,
			oneLine(device), e.Ifindex, e.MAC, e.Packets, e.Connections, seen)
	}
	return tw.Flush()
}

func explainCommand(stdout io.Writer) *cli.Command {
	var runDir string
	var asJSON bool
	return &cli.Command{
		Name: "explain",
		Usage: "everything between a container and its answer, step by step; " +
			"exit code 0: all is well, 1: warnings, 2: it is not answered",
		ArgsUsage: "<container or address>",
		Flags: []cli.Flag{
			runDirFlag(&runDir),
			jsonFlag(&asJSON),
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Len() != 1 || cmd.Args().First() == "" {
				return fmt.Errorf("explain: %w", errNothing)
			}
			report, err := fetch[doctor.Report](ctx, runDir,
				"/explain?what="+url.QueryEscape(cmd.Args().First()))
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(stdout, report)
			} else {
				_, err = report.WriteTo(printable{stdout})
			}
			if err == nil && report.Status() != doctor.OK {
				return exitError{code: int(report.Status())}
			}
			return err
		},
	}
}

func eventsCommand(stdout io.Writer) *cli.Command {
	var runDir string
	var follow, asJSON bool
	return &cli.Command{
		Name: "events",
		Usage: "packets of unknown and refused sources, and the task whose port they " +
			"came by",
		Flags: []cli.Flag{
			runDirFlag(&runDir),
			&cli.BoolFlag{Name: "follow", Usage: "go on as they happen",
				Destination: &follow},
			&cli.BoolFlag{Name: "json", Usage: "as JSON, one line each",
				Destination: &asJSON},
		},
		Action: func(ctx context.Context, _ *cli.Command) error {
			path := "/events"
			if follow {
				path += "?follow=1"
			}
			body, err := askSocket(ctx, runDir, path)
			if err != nil {
				return err
			}
			defer body.Close()
			lines := json.NewDecoder(body)
			for {
				var e event
				switch err := lines.Decode(&e); {
				case ctx.Err() != nil || err == io.EOF:
					return nil
				case err != nil:
					return fmt.Errorf("%s: %w", path, err)
				}
				if err := printEvent(stdout, e, asJSON); err != nil {
					return err
				}
			}
		},
	}
}

func printEvent(w io.Writer, e event, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(printable{w}).Encode(e)
	}
	held := ""
	if e.HeldBack > 0 {
		held = fmt.Sprintf(" (and %d more)", e.HeldBack)
	}
	_, err := fmt.Fprintf(w, "%s %s from %s, MAC %s, at %s%s%s: %s\n",
		e.Time.Format(time.DateTime),
		oneLine(e.Verdict),
		oneLine(e.Addr), oneLine(e.MAC), oneLine(e.Device), oneLine(of(e.Task)), held,
		oneLine(meanings[e.Verdict]))
	return err
}
