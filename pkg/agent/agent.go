// Package agent gets from the ECS agent what Docker does not know of a task. It reads the
// introspection API for all tasks, and the task endpoint for the v4 document of each.
package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// Config says where the agent is and how often to ask it.
type Config struct {
	URL     string        // of the introspection API, "http://host:port"; "": not asked
	TaskURL string        // of the task endpoint, "http://host:port"; "": not asked
	Every   time.Duration // between two questions; positive
	Timeout time.Duration // of each; positive
	// Changed, if not nil, is called after the agent's answers about the tasks with the given
	// ARNs have changed, or about all tasks if there are none. They should then be enriched
	// again. Run calls it, and it must not block.
	Changed func(arns ...string)
	Log     *zap.Logger
}

// DefaultConfig returns a Config for the agent at its usual place.
func DefaultConfig() Config {
	return Config{URL: "http://127.0.0.1:51678", Every: 10 * time.Second,
		Timeout: 5 * time.Second, Log: zap.NewNop()}
}

// Client holds the agent's last answers. Safe for concurrent use.
type Client struct {
	cfg    Config
	http   *http.Client
	docs   documents
	last   atomic.Pointer[answers]
	failed bool   // Run's: the last question had no answer
	raw    []byte // Run's: the last answers
}

// answers are the agent's, parsed. Immutable.
type answers struct {
	Cluster              string
	ContainerInstanceArn string
	tasks                map[string]*agentTask // by ARN
}

// {"Arn": ARN, "DesiredStatus": status, "KnownStatus": status, "Containers": [{"DockerId": id, …}]}
// (ecs-agent/introspection/v1/response.go). Statuses are PENDING, RUNNING and STOPPED; the pause
// container is not among Containers.
type agentTask struct {
	Arn           string
	DesiredStatus string
	KnownStatus   string
	Containers    []agentContainer
}

type agentContainer struct {
	DockerID string `json:"DockerId"`
	Ports    []struct {
		ContainerPort, HostPort uint16
		Protocol                string
		HostIP                  string `json:"HostIp"`
	}
	Networks []struct {
		NetworkMode                  string
		IPv4Addresses, IPv6Addresses []string
	}
}

// New returns a client without answers; Run asks. An error names the field of cfg.
func New(cfg Config) (*Client, error) {
	if err := errors.Join(checkURL("URL", cfg.URL),
		checkURL("TaskURL", cfg.TaskURL)); err != nil {
		return nil, err
	}
	switch {
	case cfg.Every <= 0:
		return nil, errors.New("agent: Every must be positive")
	case cfg.Timeout <= 0:
		return nil, errors.New("agent: Timeout must be positive")
	case cfg.Log == nil:
		return nil, errors.New("agent: Log must be set")
	}
	return &Client{cfg: cfg, docs: documents{tasks: map[string]*asked{},
		wake: make(chan struct{}, 1)}, http: &http.Client{
		Timeout: cfg.Timeout,
		// no proxy either: the agent is on this host
		Transport: &http.Transport{DisableKeepAlives: true},
	}}, nil
}

func checkURL(field, text string) error {
	u, err := url.Parse(text)
	switch {
	case text == "":
		return nil
	case err != nil:
		return fmt.Errorf("agent: %s: %w", field, err)
	case u.Scheme != "http" || u.Host == "":
		return fmt.Errorf("agent: %s must have the form http://host:port, got %q", field,
			text)
	}
	return nil
}

// Run reads the introspection API at once and then every cfg.Every, and the document of each task
// that has changed, until ctx ends. It is no error if the agent does not answer: it may start
// later, and its last answers stay. One Run at a time.
func (c *Client) Run(ctx context.Context) {
	var both sync.WaitGroup
	defer both.Wait()
	if c.cfg.TaskURL != "" {
		both.Go(func() { c.askForDocuments(ctx) })
	}
	if c.cfg.URL == "" {
		return
	}
	tick := time.NewTicker(c.cfg.Every)
	defer tick.Stop()
	for {
		if err := c.ask(ctx); ctx.Err() == nil {
			c.logChange(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Client) changed(arns ...string) {
	if c.cfg.Changed != nil {
		c.cfg.Changed(arns...)
	}
}

func (c *Client) logChange(err error) {
	switch {
	case err != nil && !c.failed:
		c.cfg.Log.Info("the ECS agent's introspection API does not answer", zap.Error(err))
	case err == nil && (c.failed || c.last.Load() == nil):
		c.cfg.Log.Info("the ECS agent's introspection API answers")
	}
	c.failed = err != nil
}

// ask gets both answers, and publishes them if they have changed.
func (c *Client) ask(ctx context.Context) error {
	metadata, err := c.get(ctx, c.cfg.URL+"/v1/metadata")
	if err != nil {
		return err
	}
	tasks, err := c.get(ctx, c.cfg.URL+"/v1/tasks")
	if err != nil {
		return err
	}
	raw := append(append(metadata, '\n'), tasks...)
	if bytes.Equal(raw, c.raw) {
		return nil
	}
	a, err := parse(metadata, tasks)
	if err != nil {
		return err
	}
	c.raw = raw
	before := c.last.Swap(a)
	if arns := a.differing(before); len(arns) > 0 {
		c.changed(arns...)
	} else if before == nil || !a.sameHost(before) {
		c.changed()
	}
	return nil
}

// sameHost reports whether a says the same as before about the host.
func (a *answers) sameHost(before *answers) bool {
	return a.Cluster == before.Cluster && a.ContainerInstanceArn == before.ContainerInstanceArn
}

// differing returns the ARNs of the tasks about which a says something else than before; none if
// that may be any task.
func (a *answers) differing(before *answers) (arns []string) {
	if before == nil || !a.sameHost(before) {
		return nil
	}
	for arn, t := range a.tasks {
		if !reflect.DeepEqual(t, before.tasks[arn]) {
			arns = append(arns, arn)
		}
	}
	for arn := range before.tasks {
		if a.tasks[arn] == nil {
			arns = append(arns, arn)
		}
	}
	return arns
}

// maxAnswer is the largest answer: some 4 KiB for each of several thousand containers.
const maxAnswer = 32 << 20

// statusError is an answer other than 200.
type statusError struct {
	url  string
	code int
}

func (e statusError) Error() string {
	return fmt.Sprintf("agent: GET %s: %d %s", e.url, e.code, http.StatusText(e.code))
}

func (c *Client) get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, statusError{url, resp.StatusCode}
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("agent: GET %s: %w", url, err)
	}
	if len(b) > maxAnswer {
		return nil, fmt.Errorf("agent: GET %s: more than %d bytes", url, maxAnswer)
	}
	return b, nil
}

// errNotAgent is an answer that is not the API's. Another server on the TCP port may answer any
// path with 200, too.
var errNotAgent = errors.New("agent: no cluster in /v1/metadata")

func parse(metadata, tasks []byte) (*answers, error) {
	a := &answers{tasks: map[string]*agentTask{}}
	if err := json.Unmarshal(metadata, a); err != nil {
		return nil, fmt.Errorf("agent: /v1/metadata: %w", err)
	}
	if a.Cluster == "" {
		return nil, errNotAgent
	}
	var list struct{ Tasks []*agentTask }
	if err := json.Unmarshal(tasks, &list); err != nil {
		return nil, fmt.Errorf("agent: /v1/tasks: %w", err)
	}
	for _, t := range list.Tasks {
		if t != nil && t.Arn != "" {
			a.tasks[t.Arn] = t
		}
	}
	return a, nil
}

// Enrich adds the agent's facts to t, which must not be published yet. A task that the agent does
// not know stays as it is.
//
//   - Cluster and ContainerInstanceARN are the agent's.
//   - KnownStatus and DesiredStatus move forward to the agent's if that is further along
//     (CREATED < RUNNING < STOPPED), never back: the answer may be older than Docker's last event,
//     and the agent's PENDING says less than the state derived from the containers. When a task is
//     to stop, so are its containers.
//   - A container without port bindings gets those of the task definition; one without networks
//     those of the task's elastic network interface, and the pause container with it.
//   - What only the task's v4 document has (pull times, ExecutionStoppedAt, launch type and so on)
//     is the document's.
func (c *Client) Enrich(t *task.Task) {
	c.docs.enrich(t, time.Now())
	a := c.last.Load()
	if a == nil {
		return
	}
	known := a.tasks[t.ARN]
	if known == nil {
		return
	}
	t.Cluster = a.Cluster
	t.ContainerInstanceARN = a.ContainerInstanceArn
	t.KnownStatus = later(t.KnownStatus, known.KnownStatus)
	t.DesiredStatus = later(t.DesiredStatus, known.DesiredStatus)
	var networks []task.Network
	for i := range known.Containers {
		ac := &known.Containers[i]
		tc := t.Container(ac.DockerID)
		if tc == nil {
			continue
		}
		if len(tc.Ports) == 0 {
			for _, p := range ac.Ports {
				tc.Ports = append(tc.Ports,
					task.Port{ContainerPort: p.ContainerPort,
						Protocol: p.Protocol, HostPort: p.HostPort,
						HostIP: p.HostIP})
			}
		}
		for _, n := range ac.Networks {
			if n.NetworkMode == "awsvpc" {
				networks = []task.Network{{Mode: n.NetworkMode,
					IPv4Addresses: n.IPv4Addresses,
					IPv6Addresses: n.IPv6Addresses}}
			}
		}
	}
	for _, tc := range t.Containers {
		if len(tc.Networks) == 0 && networks != nil {
			tc.Networks = networks
		}
		if t.DesiredStatus == task.StatusStopped {
			tc.DesiredStatus = task.StatusStopped
		}
	}
}

// order is the rank of each status that both Docker's containers and the agent have.
var order = map[task.Status]int{task.StatusCreated: 1, task.StatusRunning: 2, task.StatusStopped: 3}

func later(derived task.Status, agents string) task.Status {
	if s := task.Status(agents); order[s] > order[derived] {
		return s
	}
	return derived
}
