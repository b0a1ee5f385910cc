package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"metad/pkg/admin"
)

func lines(t *testing.T, print func(*bytes.Buffer) error) []string {
	t.Helper()
	var b bytes.Buffer
	if err := print(&b); err != nil {
		t.Fatal(err)
	}
	var out []string
	for l := range strings.Lines(b.String()) {
		out = append(out, strings.Join(strings.Fields(l), " "))
	}
	return out
}

func equal(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPrintTasks(t *testing.T) {
	tasks := &admin.Tasks{Tasks: []admin.Task{
		{ID: "t1", Family: "web", Revision: "3", Status: "RUNNING", Tag: 7,
			Endpoints: []admin.Endpoint{{Address: "172.17.0.2",
				MAC: "02:42:ac:11:00:02", Ifindex: 12}, {Address: "172.18.0.2",
				MAC: "02:42:ac:12:00:02", Ifindex: 13}},
			Containers: []admin.Container{
				{Name: "app", Number: 1, File: "proxy", URIs: "nri"}, {Name: "sidecar", Number: 127, URIs: "agent"}, {Name: "bare"}}},
		{ID: "t2", Family: "batch", Revision: "1", Status: "STOPPED", Tag: 8},
	}}
	equal(t, lines(t, func(b *bytes.Buffer) error { return printTasks(b, tasks) }),
		"TASK FAMILY STATUS TAG ADDRESS IFINDEX MAC CONTAINERS",
		"t1 web:3 RUNNING 7 172.17.0.2 12 02:42:ac:11:00:02 "+
			"1:app(file:proxy,uris:nri),127:sidecar(uris:agent),bare",
		"t1 web:3 RUNNING 7 172.18.0.2 13 02:42:ac:12:00:02 "+
			"1:app(file:proxy,uris:nri),127:sidecar(uris:agent),bare",
		"t2 batch:1 STOPPED 8 - 0 -",
	)
}

// The commands against an admin socket that answers, refuses, and talks nonsense.
func TestTasksCommand(t *testing.T) {
	answer, status := `{"Version":"v","Tasks":[{"ID":"t1","Containers":[{"Name":"app"}]}]}`, 200
	var asked string
	dir := t.TempDir()
	ln, err := net.Listen("unix", adminSocket(dir))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.URL.String()
		w.WriteHeader(status)
		fmt.Fprint(w, answer)
	})}
	go srv.Serve(ln)
	defer srv.Close()
	f := func(code int, wantAsked, want string, args ...string) {
		t.Helper()
		var out, errs bytes.Buffer
		args = append([]string{"metad"}, append(args, "--run-dir", dir)...)
		got := run(context.Background(), args, &out, &errs)
		if got != code || !strings.Contains(out.String()+errs.String(), want) ||
			wantAsked != "" && asked != wantAsked {
			t.Errorf("%q: got %d, asked %q, %s%s; want %d, %q, %q", args, got, asked,
				out.String(), errs.String(), code, wantAsked, want)
		}
		if all := out.String() + errs.String(); strings.ContainsAny(all, "\x1b\u009b\a") {
			t.Errorf("%q: a terminal would obey %q", args, all)
		}
	}
	f(0, "/tasks", "app", "tasks")
	f(0, "/tasks", `"Version": "v"`, "tasks", "--json")
	f(0, "", "CONTAINER", "top", "--once", "--every", "1ms")
	f(0, "", "[]", "top", "--json", "--every", "1ms")
	answer = `{"Version":"\u001b]0;owned\u0007","Tasks":[{"ID":"t\u009b1","Family":"a\u001b[2Jb","Containers":[{"ID":"c1","Name":"x\ny","Stats":{}}]}]}`
	f(0, "", `a\u001b[2Jb`, "tasks")
	f(0, "", `x\u000ay`, "tasks")
	f(0, "", `t\u009b1`, "tasks", "--json")
	f(0, "", `t\u009b1/x\u000ay`, "top", "--every", "1ms") // stdout is no terminal
	answer = "<html>"
	f(1, "", "/tasks: invalid character", "tasks")
	answer = "\x1b[2J"
	f(1, "", "/tasks: invalid character", "tasks")
	status = 503
	f(1, "", "/tasks: 503 Service Unavailable", "tasks")
	srv.Close()
	f(1, "", "is metad running?", "tasks")
	f(1, "", "is metad running?", "top", "--once")
	f(1, "", "want a positive duration", "top", "--every", "0s")
}
