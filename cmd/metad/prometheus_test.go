//go:build prometheus

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"metad/internal/expect"
	"metad/pkg/admin"
	"metad/pkg/cadvisor"
	"metad/pkg/lookup"
	"metad/pkg/server"
	"metad/pkg/stats"
	"metad/pkg/task"
)

// grown is a host with one container, whose counters grow.
type grown struct{ start time.Time }

func (g grown) EachKept(f func(*task.Task, *task.Container, *stats.Counters)) {
	n := uint64(time.Since(g.start))
	f(&task.Task{ID: "t1", Family: "web"},
		&task.Container{ID: "c1", Name: "app", DockerName: "web-app", Image: "nginx:1",
			Stats: new(task.StatsCell), Limits: task.ContainerLimits{Memory: 64}},
		&stats.Counters{Read: time.Now(), CPU: stats.CPU{Total: n, Periods: n,
			ThrottledPeriods: n / 2}, Memory: stats.Memory{Usage: 1 << 20,
			Limit: 1 << 26, HasKills: true,
			Stats: []stats.Stat{{Key: "total_cache", Value: n}, {Key: "total_rss",
				Value: n}, {Key: "total_swap", Value: n}}},
			Networks: []stats.Network{{Name: "eth0", RxBytes: n, TxBytes: n}},
			Blkio: stats.Blkio{ServiceBytes: []stats.BlkioEntry{{Major: 8,
				Op: "read", Value: n}, {Major: 8, Op: "write", Value: n}},
				Serviced: []stats.BlkioEntry{{Major: 8, Op: "Read", Value: n}}}})
}

// ofDashboards are the questions that well-known dashboards and alerts for cAdvisor ask of a Docker
// host (those at grafana.com with the numbers 193, 893, 14282 and 19792, and the rules of
// awesome-prometheus-alerts): the same metrics, by the same labels.
var ofDashboards = []string{
	`count(container_last_seen{image!=""})`,
	`count(time() - container_last_seen{name=~".+"} < 60)`,
	`(time() - container_start_time_seconds{name=~".+"}) / 86400`,
	`sum by (name) (rate(container_cpu_usage_seconds_total{name=~".+"}[30s])) * 100`,
	`sum by (name) (rate(container_cpu_usage_seconds_total{image!="",cpu="total"}[30s]))`,
	`rate(container_cpu_user_seconds_total{image!=""}[30s]) * 100`,
	`rate(container_cpu_system_seconds_total{image!=""}[30s]) * 100`,
	`sum by (container) (increase(container_cpu_cfs_throttled_periods_total{container!=""}[30s]))` +
		` / sum by (container) (increase(container_cpu_cfs_periods_total[30s]))`,
	`sum by (name) (container_memory_usage_bytes{name=~".+"})`,
	`sum by (name) (container_memory_working_set_bytes{name!=""})`,
	`sum by (name) (container_memory_rss{name=~".+"})`,
	`sum by (name) (container_memory_cache{name=~".+"})`,
	`sum by (name) (container_memory_swap{name=~".+"})`,
	`sum by (name) (container_spec_memory_limit_bytes{name=~".+"}` +
		` - container_memory_usage_bytes{name=~".+"})`,
	`sum by (instance, name) (container_memory_working_set_bytes{name!=""}) / sum by (instance,` +
		` name) (container_spec_memory_limit_bytes > 0) * 100`,
	`increase(container_memory_failcnt[30s])`,
	`rate(container_memory_failures_total{failure_type="pgmajfault"}[30s])`,
	`increase(container_oom_events_total{name!=""}[30s])`,
	`sum by (name) (rate(container_network_receive_bytes_total{name=~".+"}[30s]))`,
	`sum by (name) (rate(container_network_transmit_bytes_total{name=~".+"}[30s]))`,
	`sum by (name) (rate(container_network_receive_bytes_total{interface="eth0"}[30s]))`,
	`sum by (name) (rate(container_network_receive_errors_total[30s]))`,
	`sum by (name) (rate(container_network_transmit_packets_dropped_total[30s]))`,
	`sum by (name, device) (rate(container_fs_reads_bytes_total{name=~".+"}[30s]))`,
	`sum by (name, device) (rate(container_fs_writes_bytes_total{name=~".+"}[30s]))`,
	`sum by (name) (rate(container_fs_reads_total{name=~".+"}[30s])` +
		` + rate(container_fs_writes_total{name=~".+"}[30s]))`,
	`container_spec_cpu_shares{name=~".+"}`,
	`sum by (name) (container_threads{name=~".+"})`,
	`topk(5, sum by (id, name, image) (rate(container_cpu_usage_seconds_total{id=~".+"}[30s])))`,
	`sum by (instance) (container_memory_usage_bytes{job="containers"})`,
}

// A real Prometheus scrapes metad's own pages, and every expression of the dashboards, and of those
// that others made for cAdvisor, is something; the alerts' rules are loaded.
func TestPrometheus(t *testing.T) {
	table := lookup.New(&fullMap{room: true}, zap.NewNop())
	srv, err := server.New(server.DefaultConfig(), table)
	if err != nil {
		t.Fatal(err)
	}
	m := srv.Metrics()
	var answers firstAnswers
	load := func(out scraper) { // as much as requests would leave
		for range 3 {
			m.Routes[0].Answers[2].Add(1)
			m.Routes[0].Took.Observe(time.Millisecond)
			m.SampleAge.Observe(time.Second)
			answers.took.Observe(time.Second)
		}
		out.server(srv)
		out.histogram(descFirstAnswer, &answers.took)
	}
	cfg := admin.Config{Addr: "127.0.0.1:0", Containers: cadvisor.New(grown{time.Now()}),
		Collectors: everyCollector(t, table, load), Ready: func() error { return nil }}
	s, err := admin.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(t.Context()) //nolint:errcheck // it ends with the test
	api := startPrometheus(t, s.Addr().String())
	for _, expr := range ofDashboards {
		expect.Until(t, "a result of "+expr, func() bool { return results(api, expr) > 0 })
	}
	for _, name := range []string{"metad", "containers"} {
		for _, expr := range expressions(t, name) {
			expr = strings.NewReplacer("$__rate_interval", "30s", "$instance", ".*",
				"$family", ".*").Replace(expr)
			expect.Until(t, "a result of "+expr, func() bool {
				return results(api, expr) > 0
			})
		}
	}
}

// startPrometheus returns the address of a Prometheus that scrapes target each second.
func startPrometheus(t *testing.T, target string) (api string) {
	t.Helper()
	dir := t.TempDir()
	rules, err := filepath.Abs("../../packaging/prometheus/rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	_ = ln.Close()
	config := fmt.Sprintf("global: {scrape_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n"+
		"- {job_name: metad, static_configs: [{targets: [%q]}]}\n"+
		"- {job_name: containers, metrics_path: /metrics/containers, static_configs: "+
		"[{targets: [%q]}]}\n", rules, target, target)
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("prometheus", "--config.file="+file, "--storage.tsdb.path="+dir,
		"--web.listen-address="+addr)
	out := new(strings.Builder)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(out)
		}
	})
	return "http://" + addr
}

// expressions are a dashboard's.
func expressions(t *testing.T, name string) (all []string) {
	t.Helper()
	b, err := os.ReadFile("../../packaging/grafana/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			all = append(all, target.Expr)
		}
	}
	if len(all) < 10 {
		t.Fatalf("%s: got %d expressions", name, len(all))
	}
	return all
}

// results returns how many series an expression is now, 0 if there is no answer.
func results(api, expr string) int {
	resp, err := http.Get(api + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	var answer struct {
		Data struct{ Result []json.RawMessage }
	}
	if json.NewDecoder(resp.Body).Decode(&answer) != nil {
		return 0
	}
	return len(answer.Data.Result)
}
