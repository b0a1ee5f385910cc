package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
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
		runDir     string
		watch, all bool
	)
	out := &output{w: stdout}
	return &cli.Command{
		Name:  "verdicts",
		Usage: "how packets for the endpoint ended: counts, rates, and what each means",
		Flags: append(out.flags(), runDirFlag(&runDir),
			&cli.BoolFlag{Name: "watch", Usage: "print again each second",
				Destination: &watch},
			&cli.BoolFlag{Name: "all", Usage: "show those that never happened too",
				Destination: &all}),
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
				rates(now, before, time.Since(last))
				before = now
				if err := showVerdicts(out, now, watch, all); err != nil || !watch {
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

// rates sets the rates of now, which is so much later than before.
func rates(now, before []verdict, later time.Duration) {
	for i := range min(len(now), len(before)) {
		packets := now[i].Packets - min(before[i].Packets, now[i].Packets)
		now[i].Rate = float64(packets) / later.Seconds()
	}
}

func showVerdicts(out *output, list []verdict, again, all bool) error {
	if !all {
		list = slices.DeleteFunc(slices.Clone(list), func(v verdict) bool {
			return v.Packets == 0
		})
	}
	show := out.print
	if again {
		show = out.next
	}
	return show(list, func(w io.Writer) error {
		if again {
			fmt.Fprint(out.w, "\033[H\033[2J") // home, clear
		}
		return printVerdicts(w, list)
	})
}

func printVerdicts(w io.Writer, list []verdict) error {
	out := newTable(w, "VERDICT", "PACKETS", "PER SECOND", "MEANS")
	for _, v := range list {
		out.row(v.Name, v.Packets, fmt.Sprintf("%.1f", v.Rate), cmp.Or(v.Meaning, "?"))
	}
	return out.print()
}
