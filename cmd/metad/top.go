package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"time"

	"github.com/charmbracelet/x/term"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/urfave/cli/v3"

	"metad/pkg/doctor"
	"metad/pkg/top"
)

func topCommand(stdout io.Writer) *cli.Command {
	var (
		runDir string
		every  time.Duration
		once   bool
	)
	out := &output{w: stdout}
	return &cli.Command{
		Name: "top",
		Usage: "what each container uses of the host, refreshed; without a terminal, or " +
			"with --once or --output, printed once",
		Flags: append([]cli.Flag{
			runDirFlag(&runDir),
			&cli.DurationFlag{Name: "every", Value: 2 * time.Second,
				Usage: "time between refreshes, and between the two looks of " +
					"--once", Destination: &every},
			&cli.BoolFlag{Name: "once", Usage: "print once and end",
				Destination: &once},
		}, out.flags()...),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if every <= 0 {
				return fmt.Errorf("every %s: want a positive duration", every)
			}
			cfg := top.Config{Source: running(runDir), Every: every, Printable: oneLine}
			once = once || cmd.IsSet("output") || cmd.IsSet("json")
			if f, ok := stdout.(*os.File); ok && !once && term.IsTerminal(f.Fd()) {
				return top.Run(ctx, cfg, os.Stdin, f)
			}
			rows, err := top.Once(ctx, cfg)
			if err != nil {
				return err
			}
			return out.print(rows, func(w io.Writer) error {
				return top.Print(w, rows, oneLine)
			})
		},
	}
}

// running is the metad that runs, by its run directory. It implements top.Source.
type running string

// Snapshot implements top.Source. A metad that says nothing but its tasks is good enough.
func (r running) Snapshot(ctx context.Context) (*top.Snapshot, error) {
	dir := string(r)
	tasks, err := fetchTasks(ctx, dir, true)
	if err != nil {
		return nil, err
	}
	s := &top.Snapshot{At: time.Now(), Tasks: tasks}
	if verdicts, err := fetch[[]verdict](ctx, dir, "/verdicts"); err == nil {
		for _, v := range verdicts {
			if refuses(v.Name) {
				s.Refused += v.Packets
			}
		}
	}
	s.Requests, _ = requests(ctx, dir) // else none are shown
	return s, nil
}

// requests returns how many requests the running metad has answered itself.
func requests(ctx context.Context, runDir string) (sum uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	body, err := askSocket(ctx, runDir, "/metrics")
	if err != nil {
		return 0, err
	}
	defer body.Close()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(io.LimitReader(body, maxAnswer))
	if err != nil {
		return 0, err
	}
	for _, m := range families["metad_requests_total"].GetMetric() {
		sum += uint64(m.GetCounter().GetValue())
	}
	return sum, nil
}

// Look implements top.Source. A metad of an older version has no document.
func (r running) Look(ctx context.Context, id string) (*top.Look, error) {
	what := "?what=" + url.QueryEscape(id)
	steps, err := fetch[doctor.Report](ctx, string(r), "/explain"+what)
	if err != nil {
		return nil, err
	}
	document, _ := fetch[json.RawMessage](ctx, string(r), "/document"+what)
	return &top.Look{Steps: steps, Document: document}, nil
}
