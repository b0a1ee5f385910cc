package main

import (
	"sync"

	"go.uber.org/zap"

	"metad/pkg/docker"
	"metad/pkg/lookup"
)

// ports passes the loader's reports of new and deleted ports to the table and the follower. The
// loader sends reports before these two exist.
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

// connect sets the receivers of the reports. By then the table has the tasks of an earlier process.
func (p *ports) connect(table *lookup.Table, follower *docker.Follower) {
	p.table, p.follower = table, follower
	close(p.connected)
}

// close ends a wait of gone for parts that were never made. The loader's Close waits for gone.
func (p *ports) close() { p.closing.Do(func() { close(p.closed) }) }

// came receives the report of a new port: a container starts.
func (p *ports) came(ifindex int) {
	select {
	case <-p.connected:
		if err := p.table.PortCame(ifindex); err != nil {
			p.log.Error("cannot publish the addresses of a new port",
				zap.Int("ifindex", ifindex), zap.Error(err))
		}
		p.follower.PortChanged(ifindex)
	default: // the first list has not been read, and will include the port
	}
}

// gone receives the report of a deleted port.
func (p *ports) gone(ifindex int) {
	select {
	case <-p.connected:
	case <-p.closed:
		return
	}
	if err := p.table.PortGone(ifindex); err != nil {
		p.log.Error("cannot remove the addresses of a deleted port",
			zap.Int("ifindex", ifindex), zap.Error(err))
	}
	p.follower.PortChanged(ifindex)
}
