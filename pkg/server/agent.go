package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"metad/pkg/agentproxy"
)

// isAgentID reports whether an endpoint id has the form of those that the ECS agent makes, a UUID.
// metad's own ids never have it. Users can start a container with any id, so the form only decides
// whether metad asks the agent. The agent's answer shows whether the agent made the id.
func isAgentID(id string) bool {
	if len(id) != len("00000000-0000-0000-0000-000000000000") {
		return false
	}
	for i := range len(id) {
		switch ch := id[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if ch != '-' {
				return false
			}
		case '0' <= ch && ch <= '9', 'a' <= ch && ch <= 'f', 'A' <= ch && ch <= 'F':
		default:
			return false
		}
	}
	return true
}

// agentID returns the id by which the agent may know the object of c's request, or "".
func agentID(c *conn) string {
	if c.container != nil && isAgentID(c.container.EndpointID) {
		return c.container.EndpointID
	}
	if c.target.forms&ofContainer != 0 {
		return ""
	}
	for i := range c.view.Containers {
		if id := c.view.Containers[i].EndpointID; isAgentID(id) {
			return id
		}
	}
	return ""
}

// agentDocuments gets metadata documents from the ECS agent, which knows more about its containers
// than Docker does. It stores whether the agent answers: while the agent is away, requests do not
// wait for it. Safe for concurrent use.
type agentDocuments struct {
	agent    *agentproxy.Agent
	patience time.Duration // with the agent, for one document
	now      func() time.Time
	metrics  *AgentMetrics
	log      *zap.Logger

	mu sync.Mutex // guards what follows
	// the agent is away, and not asked again before this; zero: it is not away
	retry    time.Time
	told     string // the state that was logged last
	toldAt   time.Time
	away     uint64 // documents of metad's own because the agent was away
	disowned uint64 // documents of metad's own because the agent does not know the id
}

const (
	// retryEvery is the time between two requests to an agent that is away.
	retryEvery = time.Second
	// tellEvery is the shortest time between two log lines about the agent's state.
	tellEvery = 10 * time.Second
)

// States of the agent, as the log names them.
const (
	agentAnswers = "answers"
	agentAbsent  = "does not listen"
	agentHangs   = "does not answer in time"
	agentBroken  = "answers with errors"
)

var (
	errAgentAway = errors.New("the agent is away")
	errDisowned  = errors.New("the agent does not know the id")
)

// get returns the agent's document at target. about reports whether the document is the right one:
// a user may have started the container with the id of another.
func (d *agentDocuments) get(ctx context.Context, target string,
	about func(doc []byte) bool) ([]byte, error) {
	switch away, due := d.isAway(d.now()); {
	case due:
		// the request that starts the retry does not wait either
		go func() { _, _ = d.ask(ctx, target, about) }()
		return nil, errAgentAway
	case away:
		return nil, errAgentAway
	}
	return d.ask(ctx, target, about)
}

// isAway reports whether the agent is away, and whether it is time to ask it again. Only one caller
// gets due for each retry.
func (d *agentDocuments) isAway(now time.Time) (away, due bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.retry.IsZero() {
		return false, false
	}
	due = now.After(d.retry)
	if due {
		d.retry = now.Add(retryEvery)
	}
	return true, due
}

// ask gets the document from the agent, and stores whether the agent answers.
func (d *agentDocuments) ask(ctx context.Context, target string,
	about func(doc []byte) bool) ([]byte, error) {
	start := time.Now()
	status, doc, err := d.agent.Get(ctx, target, d.patience)
	d.metrics.asked(start, err)
	switch {
	case errors.Is(err, agentproxy.ErrAbsent):
		d.note(agentAbsent, true)
		return nil, errAgentAway
	case errors.Is(err, agentproxy.ErrSlow):
		d.note(agentHangs, true)
		return nil, errAgentAway
	case err != nil, status >= http.StatusInternalServerError && !isUnknownID(doc):
		d.note(agentBroken, false) // perhaps for this id alone
		return nil, errAgentAway
	}
	d.note(agentAnswers, false)
	if status != http.StatusOK || !about(doc) {
		return nil, errDisowned
	}
	return doc, nil
}

// isUnknownID reports whether doc is the v3 error for an unknown id, which has status 500.
func isUnknownID(doc []byte) bool { return bytes.Contains(doc, []byte("from v3 endpoint ID: ")) }

// note stores the agent's state and logs a change: the first one at once, later ones every
// tellEvery at most, because a client can make the agent fail by the id in its request.
func (d *agentDocuments) note(state string, away bool) {
	now := d.now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.retry = time.Time{}
	if away {
		d.retry = now.Add(retryEvery)
	}
	switch {
	case state == d.told || now.Sub(d.toldAt) < tellEvery:
	case d.told == "" && state == agentAnswers: // the usual first state needs no line
		d.told = state
	default:
		d.log.Info("state of the ECS agent changed", zap.String("agent", state))
		d.told, d.toldAt = state, now
	}
}

// count counts a document that metad sent in place of the agent's, by its reason err.
func (d *agentDocuments) count(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if errors.Is(err, errDisowned) {
		d.disowned++
	} else {
		d.away++
	}
}

// counts returns the numbers of documents that metad sent in place of the agent's.
func (d *agentDocuments) counts() (away, disowned uint64) {
	if d == nil {
		return 0, 0
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.away, d.disowned
}

// fromAgent returns the agent's document for c's request, or nil if metad's own is the answer.
func (s *Server) fromAgent(docs *agentDocuments, c *conn, version, form string) []byte {
	if docs == nil {
		return nil
	}
	id := agentID(c)
	if id == "" {
		return nil
	}
	err := errAgentAway
	if s.forwards.take(c.src) {
		defer s.forwards.give(c.src)
		var doc []byte
		if doc, err = docs.get(s.life, version+id+form, aboutOf(c)); err == nil {
			return doc
		}
	}
	docs.count(err)
	return nil
}

// aboutOf returns a function that reports whether a document is about the object of c's request.
func aboutOf(c *conn) func(doc []byte) bool {
	arn, container := c.view.Task.ARN, c.container
	if c.target.forms&ofContainer == 0 {
		return func(doc []byte) bool {
			var of struct{ TaskARN string }
			return json.Unmarshal(doc, &of) == nil && of.TaskARN == arn
		}
	}
	return func(doc []byte) bool {
		var of struct{ DockerId string } //nolint:staticcheck // the name on the wire
		return json.Unmarshal(doc, &of) == nil && of.DockerId == container.ID
	}
}
