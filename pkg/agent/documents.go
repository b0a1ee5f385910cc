package agent

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"sync"
	"time"

	"metad/pkg/task"
)

// How often the agent is asked for tasks' documents. An answer costs it about 0.1 ms.
const (
	askGap     = 50 * time.Millisecond // between two questions
	changedGap = 2 * time.Second       // between two calls of Changed
	maxTasks   = 10_000
	maxBackoff = 30 * time.Second // after questions without an answer
)

// askAfter is the time from a change of a task's containers to the request for its document: the
// agent may hear of the change later than metad. After it metad asks every askAgain.
var askAfter = []time.Duration{0, 2 * time.Second, 15 * time.Second}

const askAgain = 10 * time.Minute

// documents holds the facts that only the v4 documents of tasks have. Its methods are safe for
// concurrent use.
type documents struct {
	wake chan struct{} // there is a task to ask for

	mu    sync.Mutex // guards what follows
	tasks map[string]*asked
}

// asked is what the agent said of one task, and when metad asks again.
type asked struct {
	endpoint string // id to ask by
	state    string // of its containers, at the last change
	changed  time.Time
	asks     int // since then
	facts    *facts
}

// facts is what is taken from a task's v4 document (ecs-agent/tmds/handlers/v4/state/response.go).
type facts struct {
	TaskARN                                          string
	Limits                                           task.TaskLimits
	PullStartedAt, PullStoppedAt, ExecutionStoppedAt time.Time
	AvailabilityZone, AvailabilityZoneID             string
	LaunchType, ServiceName, VPCID                   string
	FaultInjectionEnabled                            bool
	Containers                                       []containerFacts
}

type containerFacts struct {
	DockerID     string `json:"DockerId"`
	ContainerARN string
	LogDriver    string
	LogOptions   map[string]string
	RestartCount *int
	Networks     []networkFacts
}

type networkFacts struct {
	NetworkMode                                        string
	IPv4Addresses, IPv6Addresses                       []string
	MACAddress, PrivateDNSName                         string
	IPv4SubnetCIDRBlock, IPv6SubnetCIDRBlock           string
	SubnetGatewayIpv4Address, SubnetGatewayIpv6Address string
	DomainNameServers, DomainNameSearchList            []string
}

// enrich adds the facts of its document to t, a task of ECS. If t has changed, the document is
// requested again.
func (d *documents) enrich(t *task.Task, now time.Time) {
	endpoint, state := "", strings.Builder{}
	for _, c := range t.Containers {
		if c.EndpointID != "" && (endpoint == "" || c.KnownStatus == task.StatusRunning) {
			endpoint = c.EndpointID
		}
		state.WriteString(c.ID + string(c.KnownStatus))
	}
	if endpoint == "" || t.MadeUp {
		return
	}
	d.mu.Lock()
	a := d.tasks[t.ARN]
	if a == nil {
		if len(d.tasks) >= maxTasks {
			d.mu.Unlock()
			return
		}
		a = &asked{}
		d.tasks[t.ARN] = a
	}
	due := a.endpoint != endpoint || a.state != state.String()
	if due {
		a.endpoint, a.state, a.changed, a.asks = endpoint, state.String(), now, 0
	}
	known := a.facts
	d.mu.Unlock()
	if due {
		select {
		case d.wake <- struct{}{}:
		default:
		}
	}
	if known != nil {
		known.add(t)
	}
}

// next returns the task whose document is due, or the time until one is.
func (d *documents) next(now time.Time) (arn, endpoint string, wait time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	wait = askAgain
	for of, a := range d.tasks {
		after := time.Duration(a.asks-len(askAfter)+1) * askAgain
		if a.asks < len(askAfter) {
			after = askAfter[a.asks]
		}
		if w := a.changed.Add(after).Sub(now); w < wait {
			arn, endpoint, wait = of, a.endpoint, w
		}
	}
	if wait > 0 {
		return "", "", wait
	}
	return arn, endpoint, 0
}

// answered stores the facts about a task, nil if the answer was not its document, and reports
// whether they have changed.
func (d *documents) answered(arn, endpoint string, f *facts) (changed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a := d.tasks[arn]
	if a == nil || a.endpoint != endpoint {
		return false
	}
	a.asks++
	if f == nil {
		// by now the agent would have heard of it: it has forgotten it
		if a.asks >= len(askAfter) {
			delete(d.tasks, arn)
		}
		return false
	}
	changed = !reflect.DeepEqual(a.facts, f)
	a.facts = f
	return changed
}

// askForDocuments requests the documents of tasks, one at a time, until ctx ends. It pauses if the
// agent does not answer; the last answers stay.
func (c *Client) askForDocuments(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var backoff time.Duration
	var told time.Time
	var news []string
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.docs.wake:
			if backoff > 0 {
				continue // the timer runs
			}
		case <-timer.C:
		}
		arn, endpoint, wait := c.docs.next(time.Now())
		if arn != "" {
			wait = askGap
			f, err := c.document(ctx, arn, endpoint)
			if err != nil {
				backoff = min(max(2*backoff, time.Second), maxBackoff)
				wait = backoff
			} else {
				backoff = 0
				if c.docs.answered(arn, endpoint, f) {
					news = append(news, arn)
				}
			}
		}
		if since := time.Since(told); len(news) > 0 && since >= changedGap {
			c.changed(news...)
			news, told = nil, time.Now()
		} else if len(news) > 0 {
			wait = min(wait, changedGap-since)
		}
		timer.Reset(max(wait, askGap))
	}
}

// document returns the agent's facts about a task, and nil if the answer is not the document of
// that task. A container chooses its own environment, so the endpoint id may be unknown or another
// task's.
func (c *Client) document(ctx context.Context, arn, endpoint string) (*facts, error) {
	b, err := c.get(ctx, c.cfg.TaskURL+"/v4/"+endpoint+"/task")
	if errors.As(err, new(statusError)) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := &facts{}
	if json.Unmarshal(b, f) != nil || f.TaskARN != arn {
		return nil, nil
	}
	return f, nil
}

// add adds f to t, which is not published yet.
func (f *facts) add(t *task.Task) {
	t.PullStartedAt, t.PullStoppedAt, t.ExecutionStoppedAt = f.PullStartedAt, f.PullStoppedAt,
		f.ExecutionStoppedAt
	if t.AvailabilityZone == "" { // else the operator has given it
		t.AvailabilityZone = f.AvailabilityZone
	}
	set(&t.AvailabilityZoneID, f.AvailabilityZoneID)
	set(&t.LaunchType, f.LaunchType)
	set(&t.ServiceName, f.ServiceName)
	set(&t.VPCID, f.VPCID)
	t.FaultInjectionEnabled = f.FaultInjectionEnabled
	if f.Limits != (task.TaskLimits{}) {
		t.Limits = f.Limits
	}
	for i := range f.Containers {
		of := &f.Containers[i]
		c := t.Container(of.DockerID)
		if c == nil {
			continue
		}
		set(&c.ARN, of.ContainerARN)
		if of.LogDriver != "" {
			c.LogDriver, c.LogOptions = of.LogDriver, of.LogOptions
		}
		if of.RestartCount != nil && !c.RestartPolicy { // the agent's own policy
			c.RestartPolicy, c.RestartCount = true, *of.RestartCount
		}
		if len(of.Networks) == 1 && of.Networks[0].NetworkMode == "awsvpc" {
			c.Networks = of.Networks[0].over(c.Networks)
		}
	}
}

// over returns n as the only network of a container. Where n has no value, the known one stays.
func (n *networkFacts) over(known []task.Network) []task.Network {
	var all task.Network
	if len(known) > 0 {
		all = known[0]
	} else {
		all.IPv4Addresses, all.IPv6Addresses = n.IPv4Addresses, n.IPv6Addresses
	}
	all.Mode = n.NetworkMode
	set(&all.MAC, n.MACAddress)
	set(&all.DNSName, n.PrivateDNSName)
	set(&all.Subnet, n.IPv4SubnetCIDRBlock)
	set(&all.IPv6Subnet, n.IPv6SubnetCIDRBlock)
	set(&all.SubnetGateway, n.SubnetGatewayIpv4Address)
	set(&all.IPv6SubnetGateway, n.SubnetGatewayIpv6Address)
	if len(n.DomainNameServers) > 0 {
		all.DNSServers = n.DomainNameServers
	}
	if len(n.DomainNameSearchList) > 0 {
		all.DNSSearch = n.DomainNameSearchList
	}
	return []task.Network{all}
}

// set sets *known to the agent's value, if there is one.
func set(known *string, agents string) {
	if agents != "" {
		*known = agents
	}
}
