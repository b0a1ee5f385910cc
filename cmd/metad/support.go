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

// This file has the parts that are for the operator and the host's tools. Whatever happens to them,
// containers are answered.

// runSupport starts them. sets is for the snapshot.
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

// keepSnapshot returns what writes what the next process begins with.
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

// events logs what the programs report about packets, at most once a second for each verdict, and
// has a container looked at whose MAC is not what it was.
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
			// A container that has just started, mostly.
			log, message = d.log.Debug, "packet from an address that belongs to no task"
		}
		log(message, zap.String("verdict", e.Verdict), zap.Stringer("addr", e.Addr),
			zap.Stringer("mac", e.HardwareAddr()), zap.Int("ifindex", e.Ifindex),
			zap.Uint64("held_back", held))
	})
}

// logGate lets one event a second through. The kernel's gates are the ports', so that a port that
// floods hides no other: here they come together again.
type logGate struct {
	next time.Time
	held uint64 // packets since the last event that was let through
}

// pass reports whether e is to be logged, with the packets that were held back since the last one.
func (g *logGate) pass(e loader.Event) (held uint64, ok bool) {
	g.held += e.HeldBack
	if e.Time.Before(g.next) {
		g.held++
		return 0, false
	}
	// A little less than the kernel's second: Time is converted from its clock.
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

// serveAdmin returns what serves the operator, as soon as a predecessor has left the address.
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

// serveIntrospection serves the ECS agent's introspection API, if nothing else does.
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

// ended makes an error of an end that nobody asked for.
func ended(ctx context.Context, err error) error {
	if err == nil && ctx.Err() == nil {
		return errors.New("ended")
	}
	return err
}
