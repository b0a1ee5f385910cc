package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"
)

// verdict is how many packets ended in one way.
type verdict struct {
	Name    string // the C's without VERDICT_, in lower case
	Packets uint64
	Rate    float64 // packets per second, of the time between two looks
	Meaning string
}

// meanings say what each verdict of the programs means (bpf/metad.bpf.c has the reasons).
var meanings = map[string]string{
	"not_ipv4":     "left alone: not IPv4",
	"not_meta":     "left alone: not for 169.254.170.2, or not TCP",
	"vlan":         "left alone: it has a VLAN tag",
	"malformed":    "left alone: no whole IPv4 or TCP header",
	"other_dport":  "left alone: not port 80",
	"unarmed":      "left alone: metad is not serving",
	"unarmed_drop": "dropped: metad is not serving (--on-exit=drop)",
	"unarmed_open": "to the server, which is stopping: of a connection that it has, or had a " +
		"moment ago",
	"port_task":       "to the server: the task is proved, the container is not known",
	"port_container":  "to the server: the container is proved",
	"port_unknown":    "to the server: no task has the address yet (a container that starts)",
	"port_wrong_port": "DROPPED: a container sent from an address that is another's",
	"port_wrong_mac":  "DROPPED: a container sent from its own address, but not its own MAC",
	"port_host":       "DROPPED: a container sent from the address of the host's processes",
	"port_busy": "DROPPED: a new connection of a task or port that has too many; its " +
		"client tries again after a second",
	"port_agent": "left alone: of a connection that the ECS agent has",
	"bridge_task": "to the server: seen at the bridge only, because the port has no " +
		"program",
	"bridge_trusted":   "to the server: the same, and believed (--trust-bridge)",
	"bridge_unknown":   "to the server: seen at the bridge only, and no task has the address",
	"bridge_wrong_mac": "DROPPED at the bridge: a task's address, not its MAC",
	"bridge_claimed": "DROPPED at the bridge: no task has the address, and another uses " +
		"it now",
	"bridge_host":    "DROPPED at the bridge: the address of the host's processes",
	"bridge_agent":   "left alone: of a connection that the ECS agent has",
	"host":           "to the server: a process of the host",
	"host_container": "to the server: a container in the host's network",
	"host_refused": "REFUSED: not from a process of the host (a bridge that is not " +
		"watched?)",
	"host_not_ours":    "DROPPED: on metad0, but not for the endpoint",
	"entered":          "into the server's namespace",
	"enter_unmarked":   "DROPPED: put on metad0 past its programs",
	"carried":          "an answer, out of the server's namespace",
	"reply_task":       "answered: by the port of the task",
	"reply_port":       "answered: by the port on which the unknown address was seen",
	"reply_bridge":     "answered: by the bridge on which the unknown address was seen",
	"reply_host":       "answered: to the host",
	"reply_refused":    "answered: the refusal of a host_refused",
	"reply_not_ours":   "DROPPED answer: not from the endpoint",
	"reply_nowhere":    "DROPPED answer: the address is nobody's any more",
	"reply_not_theirs": "DROPPED answer: the address has another owner since",
}

func verdictsCommand(stdout io.Writer) *cli.Command {
	var (
		runDir             string
		watch, all, asJSON bool
	)
	return &cli.Command{
		Name:  "verdicts",
		Usage: "how packets for the endpoint ended: counts, rates, and what each means",
		Flags: []cli.Flag{
			runDirFlag(&runDir),
			&cli.BoolFlag{Name: "watch", Usage: "print again each second",
				Destination: &watch},
			&cli.BoolFlag{Name: "all", Usage: "show those that never happened too",
				Destination: &all},
			jsonFlag(&asJSON),
		},
		Action: func(ctx context.Context, _ *cli.Command) error {
			before, err := fetch[[]verdict](ctx, runDir, "/verdicts")
			for err == nil {
				last := time.Now()
				pause(ctx, time.Second)
				var now []verdict
				if now, err = fetch[[]verdict](ctx, runDir,
					"/verdicts"); err != nil {
					break
				}
				seconds := time.Since(last).Seconds()
				for i := range now {
					if i < len(before) {
						now[i].Rate = float64(
							now[i].Packets-min(before[i].Packets,
								now[i].Packets)) / seconds
					}
				}
				before = now
				if watch && !asJSON {
					fmt.Fprint(stdout, "\033[H\033[2J") // home, clear
				}
				if err := printVerdicts(stdout, now, all, asJSON); err != nil ||
					!watch {
					return err
				}
			}
			if ctx.Err() != nil {
				return nil
			}
			return err
		},
	}
}

func printVerdicts(w io.Writer, list []verdict, all, asJSON bool) error {
	if !all {
		list = slices.DeleteFunc(slices.Clone(list), func(v verdict) bool {
			return v.Packets == 0
		})
	}
	if asJSON {
		return printJSON(w, list)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "VERDICT\tPACKETS\tPER SECOND\tMEANS")
	for _, v := range list {
		fmt.Fprintf(tw, "%s\t%d\t%.1f\t%s\n", oneLine(v.Name), v.Packets, v.Rate,
			oneLine(cmp.Or(v.Meaning, "?")))
	}
	return tw.Flush()
}
