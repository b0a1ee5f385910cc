package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"metad/pkg/admin"
	"metad/pkg/dockerproxy"
	"metad/pkg/introspection"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/snapshot"
	"metad/pkg/task"
)

// This file has the parts that serve the operator and the host's tools. metad answers containers
// also when these parts fail.

// runSupport starts these parts. sets is for the snapshot.
func (d *daemon) runSupport(parts *parts, sets mailbox[[]*task.Task]) {
	start := func(kind, name string, f func(context.Context, func()) error) {
		parts.runLoose(name, func(ctx context.Context) {
			keepTrying(ctx, d.log, kind, name, f)
		})
	}
	start("part", "events", d.events)
	start("part", "snapshot", d.keepSnapshot(sets))
	if d.cfg.proxySocket != "" {
		start("listener", "docker-proxy", d.serveProxy)
	}
	if d.cfg.introspect != "" {
		start("listener", "introspection", d.serveIntrospection)
	}
	if d.cfg.adminAddr != "" {
		start("listener", "admin", d.serveAdmin(admin.Listen))
	}
	start("listener", "admin-socket", d.serveAdmin(admin.ListenSocket))
}

// keepSnapshot returns the part that writes the snapshot of the tasks for the next process.
func (d *daemon) keepSnapshot(sets mailbox[[]*task.Task]) func(context.Context, func()) error {
	return func(ctx context.Context, up func()) error {
		w, err := snapshot.NewWriter(d.cfg.runDir)
		if err != nil {
			return err
		}
		up()
		w.Run(ctx, 0, sets.latest, func() ([]*lookup.View, bool) {
			return d.tasks.table.Views(), d.tasks.publishes()
		}, d.log.Named("snapshot"))
		return nil
	}
}

// events logs the programs' events, at most one a second for each verdict. After an event of a
// wrong MAC, the follower inspects the container, whose MAC may have changed.
func (d *daemon) events(ctx context.Context, up func()) error {
	up()
	gates := map[string]*logGate{}
	return d.own.loader.Events(ctx, func(e loader.Event) {
		d.dropped.add(e)
		if e.Verdict == "port_wrong_mac" || e.Verdict == "bridge_wrong_mac" {
			d.follower.WrongMAC(e.Addr)
		}
		if gates[e.Verdict] == nil {
			gates[e.Verdict] = &logGate{}
		}
		held, ok := gates[e.Verdict].pass(e)
		if !ok {
			return
		}
		log, message := d.log.Warn, "packet dropped: its source is not what its port proves"
		if e.Verdict == "port_unknown" || e.Verdict == "bridge_unknown" {
			// mostly a container that has just started
			log, message = d.log.Debug, "packet from an address that belongs to no task"
		}
		log(message, zap.String("verdict", e.Verdict), zap.Stringer("addr", e.Addr),
			zap.Stringer("mac", e.HardwareAddr()), zap.Int("ifindex", e.Ifindex),
			zap.Uint64("held_back", held))
	})
}

// logGate lets one event a second through. It is needed beside the kernel's gates, because those
// are one for each port: a port that floods must not hide the events of another.
type logGate struct {
	next time.Time
	held uint64 // packets since the last event that was let through
}

// pass reports whether e is to be logged. It also returns the number of packets since the last
// logged event.
func (g *logGate) pass(e loader.Event) (held uint64, ok bool) {
	g.held += e.HeldBack
	if e.Time.Before(g.next) {
		g.held++
		return 0, false
	}
	// a little less than the kernel's second, because Time is converted from the kernel's clock
	held, g.held, g.next = g.held, 0, e.Time.Add(time.Second-10*time.Millisecond)
	return held, true
}

// serveProxy runs the Docker API proxy.
func (d *daemon) serveProxy(ctx context.Context, up func()) error {
	cfg, err := d.cfg.proxyConfig()
	if err != nil {
		return err
	}
	proxy, err := dockerproxy.New(cfg, d.inject, d.files, d.log.Named("proxy"))
	if err != nil {
		return err
	}
	socket, err := d.own.proxySocket(cfg.Engine)
	if err != nil {
		return fmt.Errorf("docker-proxy %q: %w", d.cfg.proxySocket, err)
	}
	d.proxySocket.Store(socket)
	up()
	return ended(ctx, proxy.Serve(ctx, socket))
}

// serveAdmin returns the part that serves the operator. It listens as soon as a predecessor has
// left the address.
func (d *daemon) serveAdmin(listen func(admin.Config) (*admin.Server, error)) func(context.Context,
	func()) error {
	return func(ctx context.Context, up func()) error {
		d.own.predecessorLeft(ctx)
		s, err := listen(d.adminConfig())
		if err != nil {
			return err
		}
		up()
		return ended(ctx, s.Serve(ctx))
	}
}

// serveIntrospection serves the ECS agent's introspection API. It fails while another process has
// the address.
func (d *daemon) serveIntrospection(ctx context.Context, up func()) error {
	d.own.predecessorLeft(ctx)
	s, err := introspection.Listen(introspection.Config{
		Addr: d.cfg.introspect, Cluster: d.cfg.cluster, Version: version,
		Tasks: func() []*task.Task {
			views := d.tasks.table.Views()
			tasks := make([]*task.Task, len(views))
			for i, v := range views {
				tasks[i] = v.Task
			}
			return tasks
		},
	})
	if err != nil {
		return err
	}
	up()
	return ended(ctx, s.Serve(ctx))
}

// ended returns err, or another error if a part has ended without one before ctx has.
func ended(ctx context.Context, err error) error {
	if err == nil && ctx.Err() == nil {
		return errors.New("ended")
	}
	return err
}
