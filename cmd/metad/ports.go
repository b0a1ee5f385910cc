package main

import (
	"sync"

	"go.uber.org/zap"

	"metad/pkg/docker"
	"metad/pkg/lookup"
)

// ports passes on what the loader says about the host's ports, which it does before the parts exist
// that are to hear it.
type ports struct {
	log       *zap.Logger
	connected chan struct{} // closed when what follows is set
	table     *lookup.Table
	follower  *docker.Follower

	closing sync.Once
	closed  chan struct{}
}

func newPorts(log *zap.Logger) *ports {
	return &ports{log: log, connected: make(chan struct{}), closed: make(chan struct{})}
}

// connect names the parts that are told. The table has what an earlier process knew by then.
func (p *ports) connect(table *lookup.Table, follower *docker.Follower) {
	p.table, p.follower = table, follower
	close(p.connected)
}

// close ends the waiting for parts that never came to be: the loader's Close waits for gone.
func (p *ports) close() { p.closing.Do(func() { close(p.closed) }) }

// came is told of a port that has appeared: a container starts.
func (p *ports) came(ifindex int) {
	select {
	case <-p.connected:
		if err := p.table.PortCame(ifindex); err != nil {
			p.log.Error("addresses of a port that came back",
				zap.Int("ifindex", ifindex), zap.Error(err))
		}
		p.follower.PortChanged(ifindex)
	default: // the first list is still to come
	}
}

// gone is told of a port that has disappeared.
func (p *ports) gone(ifindex int) {
	select {
	case <-p.connected:
	case <-p.closed:
		return
	}
	if err := p.table.PortGone(ifindex); err != nil {
		p.log.Error("addresses of a port that is gone", zap.Int("ifindex", ifindex),
			zap.Error(err))
	}
	p.follower.PortChanged(ifindex)
}
