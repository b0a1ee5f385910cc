package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"

	"metad/pkg/task"
)

// world is an engine whose containers live as the bytes of an input say.
type world struct {
	*direct
	input []byte
	ids   []string
	owner map[int]string // by process: the container that it is or was of
	alive map[int]bool
	past  []events.Message
	fail  string // what a set that was applied has wrong; guarded by mu
}

func (w *world) next() int {
	if len(w.input) == 0 {
		return 0
	}
	b := w.input[0]
	w.input = w.input[1:]
	return int(b)
}

// tell emits an event: once, not at all, twice, or later.
func (w *world) tell(action events.Action, id string) {
	m := events.Message{Type: events.ContainerEventType, Action: action,
		Actor: events.Actor{ID: id}, TimeNano: time.Now().UnixNano()}
	w.mu.Lock()
	if c := w.containers[id]; c != nil {
		m.Actor.Attributes = map[string]string{"name": strings.TrimPrefix(c.Name, "/")}
		for k, v := range c.Config.Labels {
			m.Actor.Attributes[k] = v
		}
	}
	w.mu.Unlock()
	w.past = append(w.past, m)
	switch w.next() % 8 {
	case 0: // lost
	case 1:
		w.send(m)
		w.send(m)
	case 2: // later, by a step that repeats what is past
	default:
		w.send(m)
	}
}

func (w *world) send(m events.Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.streams {
		ch <- m
	}
}

// process gives a container a new life, with the lowest address that is free.
func (w *world) process(c *container.InspectResponse) {
	pid := 100 + len(w.owner)
	w.owner[pid], w.alive[pid] = c.ID, true
	taken := map[string]bool{}
	for _, other := range w.containers {
		if other.State.Running && other.NetworkSettings.Networks["bridge"] != nil {
			taken[other.NetworkSettings.Networks["bridge"].IPAddress] = true
		}
	}
	for n := 2; c.NetworkSettings.Networks["bridge"] != nil; n++ {
		if a := fmt.Sprintf("172.17.0.%d", n); !taken[a] {
			c.NetworkSettings.Networks["bridge"].IPAddress = a
			break
		}
	}
	*c.State = container.State{Status: "running", Running: true, Pid: pid,
		StartedAt: time.Now().UTC().Format(time.RFC3339Nano)}
}

// step does what one byte of the input says.
func (w *world) step(f *Follower) {
	what := w.next()
	id := ""
	if n := w.next(); len(w.ids) > 0 {
		id = w.ids[n%len(w.ids)]
	}
	w.mu.Lock()
	there := w.containers[id] != nil
	running := there && w.containers[id].State.Running
	w.mu.Unlock()
	switch what % 9 {
	case 0:
		w.create(id, w.next())
	case 1:
		if there && !running {
			w.change(id, func(c *container.InspectResponse) { w.process(c) })
			w.tell(events.ActionStart, id)
		}
	case 2:
		if running {
			w.change(id, func(c *container.InspectResponse) {
				delete(w.alive, c.State.Pid)
				stopped(c)
				if n := c.NetworkSettings.Networks["bridge"]; n != nil {
					n.IPAddress = ""
				}
			})
			w.tell(events.ActionDie, id)
		}
	case 3:
		if there && !running {
			w.remove(id)
			w.tell(events.ActionDestroy, id)
		}
	case 4:
		if len(w.past) > 0 {
			w.send(w.past[w.next()%len(w.past)])
		}
	case 5:
		f.PortChanged(100 + w.next()%8)
	case 6:
		if there {
			name := fmt.Sprint("/n", w.next(), len(w.past))
			w.change(id, func(c *container.InspectResponse) { c.Name = name })
			w.tell(events.ActionRename, id)
		}
	case 7:
		time.Sleep(time.Duration(w.next()) * time.Millisecond)
	case 8:
		time.Sleep(time.Duration(w.next()) * 200 * time.Millisecond)
	}
}

// create adds a container: alone, of a project, or in another's namespace.
func (w *world) create(other string, kind int) {
	id := w.run(func(c *container.InspectResponse) {
		*c.State = container.State{Status: "created"}
		c.NetworkSettings.Networks["bridge"].IPAddress = ""
		switch {
		case kind%3 == 1:
			c.Config.Labels = map[string]string{labelComposeProject: fmt.Sprint("p",
				kind%2), labelComposeService: c.Name}
		case kind%3 == 2 && other != "":
			c.HostConfig.NetworkMode = container.NetworkMode("container:" + other)
			c.NetworkSettings.Networks = nil
		}
	})
	w.ids = append(w.ids, id)
	w.tell(events.ActionCreate, id)
}

// read is what a look into a namespace finds.
func (w *world) read(c *task.Container) (*namespace, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.alive[c.PID] {
		return nil, fs.ErrNotExist
	}
	return fakeNamespace(c)
}

// check looks for somebody else's container, or address, in a task.
func (w *world) check(tasks []*task.Task) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	in := map[string]*task.Task{}
	for _, t := range tasks {
		for _, c := range t.Containers {
			if in[c.ID] != nil {
				return fmt.Sprintf("%s is in two tasks", c.DockerName)
			}
			in[c.ID] = t
		}
	}
	for _, t := range tasks {
		for _, c := range t.Containers {
			host, guest := strings.CutPrefix(c.NetworkMode, "container:")
			project := c.Labels[labelComposeProject]
			switch {
			case project != "" && t.ID != project, project == "" && !guest &&
				!strings.HasPrefix(c.ID, t.ID),
				project == "" && guest && in[host] != t &&
					!strings.HasPrefix(c.ID, t.ID) && in[host] != nil:
				return fmt.Sprintf("%s is in task %s", c.DockerName, t.ID)
			}
		}
		for _, ep := range t.Endpoints {
			if in[w.owner[ep.Ifindex]] != t {
				return fmt.Sprintf(
					"task %s has the address of another's process: %v", t.ID,
					ep)
			}
		}
	}
	return ""
}

// FuzzFollower has containers come, change and go, and tells of it in any order, twice or not at
// all, while the Engine answers late. No set has somebody else's container or address in a task;
// and after a list all is as a fresh look would find it.
func FuzzFollower(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3, 1, 0, 3, 8, 0, 9, 2, 0, 3, 1, 0, 0, 4, 0, 0, 7, 0, 50})
	f.Add([]byte{0, 0, 1, 3, 0, 0, 1, 3, 1, 0, 3, 1, 1, 0, 0, 0, 2, 3, 1, 2, 2, 3, 0, 8, 0, 255,
		6, 1, 9, 1})
	f.Add([]byte(
		"\x00\x00\x02\x03\x01\x00\x03\x00\x00\x02\x03\x01\x01\x03\x02\x00\x00\x03\x00\x03\x08\x00\xff\x04\x00\x00\x04\x00\x01"))
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 400 {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			w := &world{direct: newDirect(t), input: input, owner: map[int]string{},
				alive: map[int]bool{}}
			asked := 0
			w.inspecting = func(ctx context.Context, id string) error {
				w.mu.Lock()
				asked++
				d := time.Duration(asked*len(input)%37) * 10 * time.Millisecond
				w.mu.Unlock()
				return after(ctx, d)
			}
			w.setUp = func(f *Follower) {
				f.read = w.read
				f.state.inode = func(pid int) uint64 {
					w.mu.Lock()
					defer w.mu.Unlock()
					if w.alive[pid] {
						return uint64(pid)
					}
					return 0
				}
			}
			o := observe(t, w.direct, nil, func(c *Config) {
				apply := c.Apply
				c.Apply = func(tasks []*task.Task) {
					apply(tasks)
					if wrong := w.check(tasks); wrong != "" {
						w.mu.Lock()
						w.fail = wrong
						w.mu.Unlock()
					}
				}
			})
			for len(w.input) > 0 {
				w.step(o.Follower)
			}
			// what follows is a list, and a look at everything
			w.dropped <- errors.New("the stream has ended")
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			fresh := observe(t, w.direct, nil)
			<-fresh.Synced()
			time.Sleep(time.Minute)
			synctest.Wait()
			if got, want := show(o.last()), show(fresh.last()); got != want {
				t.Errorf("after a list:\n%s\na fresh look:\n%s", got, want)
			}
			w.mu.Lock()
			if w.fail != "" {
				t.Error(w.fail)
			}
			w.mu.Unlock()
			o.end(t)
			fresh.end(t)
		})
	})
}
