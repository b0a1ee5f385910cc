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
	changedGap = 2 * time.Second       // between two calls of Changed: each makes all tasks anew
	maxTasks   = 10_000
	maxBackoff = 30 * time.Second // after questions without an answer
)

// askAfter is when a task's document is asked for after a change of its containers: the agent may hear of the
// change later than metad. Then it is asked for every askAgain.
var askAfter = []time.Duration{0, 2 * time.Second, 15 * time.Second}

const askAgain = 10 * time.Minute

// documents knows what tasks' v4 documents say that neither Docker nor the introspection API does. Its
// methods are safe for concurrent use.
type documents struct {
	wake chan struct{} // there is a task to ask for

	mu    sync.Mutex // guards what follows
	tasks map[string]*asked
}

// asked is what is known of one task, and when to ask again.
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

// enrich adds to t, which is a task of ECS, what its document said, and has it asked for if t has changed.
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

// next returns the task to ask for now, or else how long there is none.
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

// answered notes what the agent said of a task, nil if that was not its document, and reports whether that is new.
func (d *documents) answered(arn, endpoint string, f *facts) (changed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a := d.tasks[arn]
	if a == nil || a.endpoint != endpoint {
		return false
	}
	a.asks++
	if f == nil {
		if a.asks >= len(askAfter) { // by now the agent would have heard of it: it has forgotten it
			delete(d.tasks, arn)
		}
		return false
	}
	changed = !reflect.DeepEqual(a.facts, f)
	a.facts = f
	return changed
}

// askForDocuments asks for tasks' documents, one at a time, until ctx ends. An agent that does not answer is left alone
// for a while; what it said before is kept.
func (c *Client) askForDocuments(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var backoff time.Duration
	var told time.Time
	news := false
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
				news = c.docs.answered(arn, endpoint, f) || news
			}
		}
		if since := time.Since(told); news && since >= changedGap {
			news, told = false, time.Now()
			c.changed()
		} else if news {
			wait = min(wait, changedGap-since)
		}
		timer.Reset(max(wait, askGap))
	}
}

// document returns what the agent says of a task; nil if it answers anything but the task's document. A
// container chooses its own environment, so the endpoint id may be nobody's or another task's.
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
	t.PullStartedAt, t.PullStoppedAt, t.ExecutionStoppedAt = f.PullStartedAt, f.PullStoppedAt, f.ExecutionStoppedAt
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

// over returns n as a container's only network; what was known before stands where n says nothing.
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

// set sets *known to what the agent says, if it says anything.
func set(known *string, agents string) {
	if agents != "" {
		*known = agents
	}
}
