package main

import (
	"context"
	"io"
	"strconv"
	"strings"

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
