package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"metad/pkg/admin"
)

// fetchTasks asks the running metad for its tasks.
func fetchTasks(ctx context.Context, runDir string, stats bool) (*admin.Tasks, error) {
	path := "/tasks"
	if stats {
		path += "?stats=1"
	}
	t, err := fetch[admin.Tasks](ctx, runDir, path)
	return &t, err
}

func tasksCommand(stdout io.Writer) *cli.Command {
	return lookCommand(stdout, "tasks", "list the tasks that the running metad knows", "/tasks",
		func(w io.Writer, t admin.Tasks) error { return printTasks(w, &t) })
}

func printTasks(w io.Writer, t *admin.Tasks) error {
	out := newTable(w, "TASK", "FAMILY", "STATUS", "TAG", "ADDRESS", "IFINDEX", "MAC",
		"CONTAINERS")
	for _, tk := range t.Tasks {
		names := make([]string, len(tk.Containers))
		for i, c := range tk.Containers {
			if names[i] = c.Name + has(c); c.Number != 0 {
				names[i] = strconv.Itoa(c.Number) + ":" + names[i]
			}
		}
		eps := tk.Endpoints
		if len(eps) == 0 {
			eps = []admin.Endpoint{{Address: "-", MAC: "-"}}
		}
		for _, ep := range eps {
			out.row(tk.ID, tk.Family+":"+tk.Revision, tk.Status, tk.Tag, ep.Address,
				ep.Ifindex, ep.MAC, strings.Join(names, ","))
		}
	}
	return out.print()
}

// has says what a container has been given and which way, "(file:proxy,uris:nri)", "" if nothing.
func has(c admin.Container) string {
	var all []string
	if c.File != "" {
		all = append(all, "file:"+c.File)
	}
	if c.URIs != "" {
		all = append(all, "uris:"+c.URIs)
	}
	if all == nil {
		return ""
	}
	return "(" + strings.Join(all, ",") + ")"
}

func topCommand(stdout io.Writer) *cli.Command {
	var (
		runDir string
		every  time.Duration
		once   bool
	)
	return &cli.Command{
		Name:  "top",
		Usage: "show the busiest containers, refreshed",
		Flags: []cli.Flag{
			runDirFlag(&runDir),
			&cli.DurationFlag{Name: "every", Value: 2 * time.Second,
				Usage: "time between refreshes", Destination: &every},
			&cli.BoolFlag{Name: "once", Usage: "print once and end",
				Destination: &once},
		},
		Action: func(ctx context.Context, _ *cli.Command) error {
			if every <= 0 {
				return fmt.Errorf("every %s: want a positive duration", every)
			}
			for {
				t, err := fetchTasks(ctx, runDir, true)
				if ctx.Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				if !once {
					fmt.Fprint(stdout, "\033[H\033[2J") // home, clear
				}
				if err := printTop(stdout, t); err != nil || once {
					return err
				}
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
}

// usage is what top reads of a sample.
type usage struct {
	CPU    cpu `json:"cpu_stats"`
	PreCPU cpu `json:"precpu_stats"`
	Memory struct {
		Usage uint64 `json:"usage"`
		Limit uint64 `json:"limit"`
	} `json:"memory_stats"`
	Networks map[string]struct {
		RxBytes uint64 `json:"rx_bytes"`
		TxBytes uint64 `json:"tx_bytes"`
	} `json:"networks"`
}

type cpu struct {
	Usage struct {
		Total uint64 `json:"total_usage"`
	} `json:"cpu_usage"`
	System uint64 `json:"system_cpu_usage"`
	Online uint64 `json:"online_cpus"`
}

// cpuPercent is the share of one core between the two samples, as `docker stats` shows it.
func (u *usage) cpuPercent() float64 {
	used, system := float64(u.CPU.Usage.Total)-float64(u.PreCPU.Usage.Total),
		float64(u.CPU.System)-float64(u.PreCPU.System)
	if used <= 0 || system <= 0 {
		return 0
	}
	return used / system * float64(u.CPU.Online) * 100
}

func printTop(w io.Writer, t *admin.Tasks) error {
	type row struct {
		task, name string
		u          usage
	}
	var rows []row
	for _, tk := range t.Tasks {
		for _, c := range tk.Containers {
			var u *usage
			if json.Unmarshal(c.Stats, &u) != nil || u == nil {
				continue // no sample: stopped, or not sampled yet
			}
			rows = append(rows, row{oneLine(tk.ID), oneLine(c.Name), *u})
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(b.u.cpuPercent(), a.u.cpuPercent()),
			cmp.Compare(b.u.Memory.Usage, a.u.Memory.Usage))
	})
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "CPU %\tMEM MIB\tLIMIT MIB\tRX MIB\tTX MIB\t  CONTAINER\t")
	for _, r := range rows {
		var rx, tx uint64
		for _, n := range r.u.Networks {
			rx, tx = rx+n.RxBytes, tx+n.TxBytes
		}
		const mib = 1 << 20
		fmt.Fprintf(tw, "%.1f\t%.1f\t%d\t%.1f\t%.1f\t  %s/%s\t\n", r.u.cpuPercent(),
			float64(r.u.Memory.Usage)/mib,
			r.u.Memory.Limit/mib, float64(rx)/mib, float64(tx)/mib, r.task, r.name)
	}
	return tw.Flush()
}
