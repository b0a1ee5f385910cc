//go:build root && screenshots

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"metad/internal/child"
	"metad/internal/expect"
	"metad/internal/picture"
	"metad/internal/testdocker"
	"metad/internal/testnet"
)

// images is where the documentation's pictures are.
const images = "../../docs/images"

// watched is how long the host is watched before its pictures are made.
const watched = 100 * time.Second

// TestScreenshots makes the documentation's pictures: metad top in a terminal, and a dashboard's
// panels as a real Prometheus answers their questions. make screenshots runs it.
func TestScreenshots(t *testing.T) {
	h := testdocker.Start(t)
	busyHost(t, h)
	d := startMetad(t, h, "--container-metrics")
	prometheus := scraping(t, h)
	const columns, lines = 126, 24
	tmux := terminalOf(t, d, columns, lines)
	begun := time.Now()
	time.Sleep(watched)
	picture1 := tmux("capture-pane", "-p", "-e")
	tmux("send-keys", "Enter")
	tmux("resize-window", "-x", strconv.Itoa(columns), "-y", "40")
	expect.Until(t, "the container's page", func() bool {
		return strings.Contains(tmux("capture-pane", "-p"), "its document")
	})
	save(t, "top.svg", picture.Terminal(picture1, columns))
	save(t, "top-container.svg", picture.Terminal(tmux("capture-pane", "-p", "-e"), columns))
	save(t, "dashboard.svg", dashboard(t, prometheus, begun, time.Now()))
}

func save(t *testing.T, name string, b []byte) {
	t.Helper()
	err := os.MkdirAll(images, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(images, name), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// busyHost starts tasks that do something, now more, now less.
func busyHost(t *testing.T, h *testdocker.Host) {
	one := func(name, script string, cpus float64, memory int64) testdocker.Container {
		return testdocker.Container{Name: name, Cmd: []string{"sh", "-c", script},
			Configure: func(_ *container.Config, host *container.HostConfig) {
				host.NanoCPUs, host.Memory = int64(cpus*1e9), memory<<20
			}}
	}
	const waves = `while :; do for i in 1 2 3 4 5 4 3 2; do timeout $i sh -c 'while :; do :; done'; ` +
		`sleep $((6 - i)); done; done`
	const asks = `while :; do wget -qO /dev/null http://169.254.170.2/v4/task; sleep 0.%d; done`
	const writes = `while :; do dd if=/dev/zero of=/f bs=64k count=%d oflag=direct; sleep 2; done 2>/dev/null`
	for _, task := range []testdocker.Task{
		{ID: "7f3c21a90b5d4e6f8a1b2c3d4e5f6071", Family: "shop",
			Containers: []testdocker.Container{
				one("web", waves, 0.35, 64), one("cache", "awk 'BEGIN { s = sprintf(\"%20000000s\", "+
					"\"x\"); system(\"sleep 1000000\"); print s }'", 0.1, 48)}},
		{ID: "1d9e8c7b6a5f4e3d2c1b0a9f8e7d6c5b", Family: "orders",
			Containers: []testdocker.Container{
				one("api", fmt.Sprintf(asks, 2), 0.2, 64), one("worker", waves, 0.15, 32)}},
		{ID: "c0ffee00112233445566778899aabbcc", Family: "reports",
			Containers: []testdocker.Container{
				one("export", fmt.Sprintf(writes, 100), 0.3, 64)}},
	} {
		h.RunTask(t, task)
	}
	h.Run(t, one("db", fmt.Sprintf(writes, 40), 0.2, 128))
	h.Run(t, one("proxy", fmt.Sprintf(asks, 5), 0.2, 32))
	h.Run(t, one("cron", "while :; do sleep 7; ls -R / >/dev/null 2>&1; done", 0.1, 16))
}

// terminalOf runs metad top in a terminal of its own, and returns what sends commands to it.
func terminalOf(t *testing.T, d *process, columns, lines int) func(command string,
	args ...string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "tmux")
	tmux := func(command string, args ...string) string {
		t.Helper()
		cmd := exec.Command("tmux",
			append([]string{"-S", socket, "-f", "/dev/null", command},
				args...)...)
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TERM=xterm-256color")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tmux %s: %v\n%s", command, err, out)
		}
		return string(out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tmux("new-session", "-d", "-x", strconv.Itoa(columns), "-y", strconv.Itoa(lines), "env",
		asMetad+"=1", self, "top", "--run-dir", d.runDir(), "--every", "1s")
	t.Cleanup(func() { tmux("kill-server") })
	return tmux
}

// scraping starts a Prometheus on h that reads metad's pages each second, and returns a client.
func scraping(t *testing.T, h *testdocker.Host) *http.Client {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "prometheus.yml")
	config := fmt.Sprintf("global: {scrape_interval: 1s}\nscrape_configs:\n"+
		"- {job_name: containers, metrics_path: /metrics/containers, static_configs: "+
		"[{targets: [%q]}]}\n", defaultAdmin)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	p := child.Start(t, h.Command("prometheus", "--config.file="+file,
		"--storage.tsdb.path="+dir, "--web.listen-address="+prometheusAddr), nil)
	t.Cleanup(p.Kill)
	return &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return testnet.Dial(h.NS, "", prometheusAddr, 5*time.Second)
		}}}
}

const prometheusAddr = "127.0.0.1:9090"

// dashboard draws the panels of the containers' dashboard.
func dashboard(t *testing.T, prometheus *http.Client, from, until time.Time) []byte {
	t.Helper()
	b, err := os.ReadFile("../../packaging/grafana/containers.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title       string
			FieldConfig struct{ Defaults struct{ Unit string } }
			Targets     []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	var all []picture.Chart
	for _, p := range board.Panels {
		c := picture.Chart{Title: p.Title, Unit: p.FieldConfig.Defaults.Unit}
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "10s", "$instance", ".*",
				"$family", ".*").Replace(target.Expr)
			c.Series = append(c.Series, queryRange(t, prometheus, expr, from, until)...)
		}
		all = append(all, c)
	}
	return picture.Charts(all, float64(from.Unix()), float64(until.Unix()))
}

func queryRange(t *testing.T, prometheus *http.Client, expr string, from,
	until time.Time) (all []picture.Series) {
	t.Helper()
	resp, err := prometheus.Get(
		fmt.Sprintf("http://%s/api/v1/query_range?step=2&start=%d&end=%d&"+
			"query=%s", prometheusAddr, from.Unix(), until.Unix(),
			url.QueryEscape(expr)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Data struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		t.Fatalf("%s: %v", expr, err)
	}
	for _, r := range answer.Data.Result {
		s := picture.Series{Name: strings.TrimSpace(r.Metric["family"] + " " +
			r.Metric["container"])}
		for _, v := range r.Values {
			at, _ := v[0].(float64)
			text, _ := v[1].(string)
			if n, err := strconv.ParseFloat(text, 64); err == nil && n == n {
				s.Points = append(s.Points, [2]float64{at, n})
			}
		}
		all = append(all, s)
	}
	return all
}
