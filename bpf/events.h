/*
 * Events: the packets that user space hears of, each verdict and port once a second at most.
 */
#ifndef EVENTS_H
#define EVENTS_H

#include "metad.h"
#include "packet.h"

#define EVENT_INTERVAL_NS (1ULL * 1000 * 1000 * 1000)
/* The gates of each verdict. A port that floods hides only the events of the ports that share its
 * gate, by their ifindex. */
#define EVENT_GATES 64
#define EVENT_GATES_IN_ALL (VERDICT_COUNT * EVENT_GATES)

/* A packet that user space logs. */
struct event {
	__u64 time_ns; /* bpf_ktime_get_ns */
	__u64 held_back; /* packets at this gate since its last event that made no event */
	enum verdict verdict;
	__u32 ifindex; /* the device that it came in on */
	__be32 addr; /* its source */
	__u8 mac[ETH_ALEN];
	__u8 pad[2];
};

/* Each gate makes one event a second at most. The size is the smallest multiple of every
 * architecture's page, and holds minutes of the events that one port can cause. Full: the next
 * event counts what was lost. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__type(value, struct event);
	__uint(max_entries, 65536);
} events SEC(".maps");

struct event_gate {
	struct bpf_spin_lock lock;
	__u32 pad;
	__u64 next_ns; /* no event before */
	__u64 held_back;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct event_gate);
	__uint(max_entries, EVENT_GATES_IN_ALL);
} event_gates SEC(".maps");

/* emit_event sends an event of verdict v to user space, or counts it as held back. */
static __always_inline void emit_event(struct __sk_buff *skb, const struct sender *s,
				       enum verdict v)
{
	__u32 key = v * EVENT_GATES + skb->ifindex % EVENT_GATES;
	struct event_gate *gate = bpf_map_lookup_elem(&event_gates, &key);
	__u64 now = bpf_ktime_get_ns(), held_back = 0;
	struct event *e;
	int closed;

	if (!gate)
		return;
	bpf_spin_lock(&gate->lock);
	closed = now < gate->next_ns;
	if (closed) {
		gate->held_back++;
	} else {
		gate->next_ns = now + EVENT_INTERVAL_NS;
		held_back = gate->held_back;
		gate->held_back = 0;
	}
	bpf_spin_unlock(&gate->lock);
	if (closed)
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		bpf_spin_lock(&gate->lock);
		gate->held_back += held_back + 1;
		bpf_spin_unlock(&gate->lock);
		return;
	}
	e->time_ns = now;
	e->held_back = held_back;
	e->verdict = v;
	e->ifindex = skb->ifindex;
	e->addr = s->addr;
	__builtin_memcpy(e->mac, s->mac, ETH_ALEN);
	e->pad[0] = e->pad[1] = 0;
	bpf_ringbuf_submit(e, 0);
}

#endif
