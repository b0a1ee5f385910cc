// Package top shows an operator what each container of the host uses, in a terminal or as text.
package top

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/colorprofile"

	"metad/pkg/admin"
	"metad/pkg/doctor"
)

// Source is a running metad. Its methods are called from several goroutines at once.
type Source interface {
	// Snapshot returns what metad knows now, with the containers' newest samples.
	Snapshot(ctx context.Context) (*Snapshot, error)
	// Look returns what there is to say about one container beside its numbers.
	Look(ctx context.Context, id string) (*Look, error)
}

// Snapshot is what a running metad knows at one moment.
type Snapshot struct {
	At       time.Time
	Tasks    *admin.Tasks // with statistics
	Requests uint64       // answered so far
	Refused  uint64       // packets for the endpoint that were dropped so far
}

// Look is one container's way to its answer, step by step, and its document of v4.
type Look struct {
	Steps    doctor.Report
	Document json.RawMessage // nil: metad has none
}

// Config says what to show and where.
type Config struct {
	Source Source
	Every  time.Duration // between two snapshots
	// Printable returns text that comes from containers as a terminal may have it.
	Printable func(string) string
}

// patience is how long a source may take for an answer.
const patience = 10 * time.Second

// Run shows the containers until the operator ends it, or ctx does.
func Run(ctx context.Context, cfg Config, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	profile := colorprofile.ANSI
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		profile = colorprofile.Ascii
	}
	_, err := tea.NewProgram(newModel(ctx, cfg), tea.WithContext(ctx), tea.WithInput(in),
		tea.WithOutput(out), tea.WithColorProfile(profile), tea.WithFPS(fps)).Run()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// fps is how often the screen is drawn anew at most, a second.
const fps = 20

// Row is what one container uses.
type Row struct {
	Task, Family string
	ID, Name     string  // of the container
	CPU          float64 // percent of one core
	Memory       uint64  // bytes, without inactive page cache
	MemoryLimit  uint64  // bytes; the host's memory if it has none
	// bytes per second
	Received, Sent, Read, Written float64
	Connections                   float64 // to the endpoint, per second
}

// Once returns what the running containers use, the busiest first, over the time between two
// samples.
func Once(ctx context.Context, cfg Config) ([]Row, error) {
	h := newHistory()
	for range 2 {
		s, err := cfg.Source.Snapshot(ctx)
		if err != nil {
			return nil, err
		}
		h.add(s)
		if h.snapshots == 2 {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(cfg.Every):
		}
	}
	rows := []Row{}
	for _, e := range arrange(h.containers, view{}) {
		if e.sampled {
			u := &e.now
			rows = append(rows, Row{e.task.ID, e.task.Family, e.container.ID, e.name,
				u[cpu],
				uint64(u[memory]), uint64(e.limit), u[received], u[sent], u[read],
				u[written], u[connections]})
		}
	}
	return rows, nil
}

// Print prints rows as a table.
func Print(w io.Writer, rows []Row, printable func(string) string) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "CPU %\tMEMORY\tLIMIT\tRX/S\tTX/S\tREAD/S\tWRITE/S\tCONN/S\t  CONTAINER\t")
	for _, r := range rows {
		fmt.Fprintf(tw, "%.1f\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t  %s/%s\t\n", r.CPU,
			size(float64(r.Memory)), size(float64(r.MemoryLimit)), size(r.Received),
			size(r.Sent), size(r.Read), size(r.Written), count(r.Connections),
			printable(r.Task), printable(r.Name))
	}
	return tw.Flush()
}
