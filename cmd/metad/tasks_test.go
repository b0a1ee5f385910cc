package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"metad/pkg/admin"
)

// sampleOf is what top reads of a sample.
func sampleOf(total, preTotal, system, preSystem, online, memory int) json.RawMessage {
	return fmt.Appendf(nil,
		`{"cpu_stats":{"cpu_usage":{"total_usage":%d},"system_cpu_usage":%d,"online_cpus":%d},`+
			`"precpu_stats":{"cpu_usage":{"total_usage":%d},"system_cpu_usage":%d},"memory_stats":{"usage":%d,"limit":2097152},`+
			`"networks":{"eth0":{"rx_bytes":1048576,"tx_bytes":0},"eth1":{"rx_bytes":1048576,"tx_bytes":524288}}}`,
		total, system, online, preTotal, preSystem, memory)
}

func TestCPUPercent(t *testing.T) {
	f := func(sample json.RawMessage, want float64) {
		t.Helper()
		var u usage
		if err := json.Unmarshal(sample, &u); err != nil {
			t.Fatal(err)
		}
		if got := u.cpuPercent(); got != want {
			t.Errorf("%s: got %v, want %v", sample, got, want)
		}
	}
	f(sampleOf(150, 100, 2000, 1000, 4, 0), 20) // 50 of 1000, of four CPUs
	f(sampleOf(100, 100, 2000, 1000, 4, 0), 0)
	f(sampleOf(50, 100, 2000, 1000, 4, 0), 0) // the cgroup was made anew
	f(sampleOf(150, 100, 1000, 1000, 4, 0), 0)
	f(sampleOf(150, 100, 500, 1000, 4, 0), 0)
	f(json.RawMessage(`{}`), 0)
}

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

func TestPrintTop(t *testing.T) {
	tasks := &admin.Tasks{Tasks: []admin.Task{
		{ID: "t1", Containers: []admin.Container{
			{Name: "idle", Stats: sampleOf(100, 100, 2000, 1000, 4, 1<<20)},
			{Name: "large", Stats: sampleOf(100, 100, 2000, 1000, 4, 2<<20)},
			{Name: "new"}, // no sample yet
			{Name: "gone", Stats: json.RawMessage("null")},
		}},
		{ID: "t2", Containers: []admin.Container{{Name: "busy", Stats: sampleOf(150, 100, 2000, 1000, 4, 0)}}},
	}}
	equal(t, lines(t, func(b *bytes.Buffer) error { return printTop(b, tasks) }),
		"CPU % MEM MIB LIMIT MIB RX MIB TX MIB CONTAINER",
		"20.0 0.0 2 2.0 0.5 t2/busy",
		"0.0 2.0 2 2.0 0.5 t1/large",
		"0.0 1.0 2 2.0 0.5 t1/idle",
	)
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
		if all := out.String() + errs.String(); strings.ContainsAny(strings.ReplaceAll(all,
			"\x1b[H\x1b[2J", ""), "\x1b\u009b\a") {
			t.Errorf("%q: a terminal would obey %q", args, all)
		}
	}
	f(0, "/tasks", "app", "tasks")
	f(0, "/tasks", `"Version": "v"`, "tasks", "--json")
	f(0, "/tasks?stats=1", "CONTAINER", "top", "--once")
	answer = `{"Version":"\u001b]0;owned\u0007","Tasks":[{"ID":"t\u009b1","Family":"a\u001b[2Jb","Containers":[{"Name":"x\ny","Stats":{}}]}]}`
	f(0, "", `a\u001b[2Jb`, "tasks")
	f(0, "", `x\u000ay`, "tasks")
	f(0, "", `t\u009b1`, "tasks", "--json")
	f(0, "", `t\u009b1/x\u000ay`, "top", "--once")
	answer = "<html>"
	f(1, "", "/tasks: invalid character", "tasks")
	answer = "\x1b[2J"
	f(1, "", "/tasks: invalid character", "tasks")
	status = 503
	f(1, "", "/tasks: 503 Service Unavailable", "tasks")
	srv.Close()
	f(1, "", "is metad running?", "tasks")
	f(1, "", "is metad running?", "top", "--once")
}
