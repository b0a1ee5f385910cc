//go:build ignore

/*
 * metad's tc programs: they take TCP for 169.254.170.2:80 off a container's veth, tag it with what
 * the veth proves about its sender, and hand it straight to the server's namespace and back.
 *
 *   metad_port    tc ingress, every veth that is a port of a watched bridge
 *   metad_bridge  tc ingress, the bridge devices: what came in by a port without a hook
 *   metad_enter   tc ingress, metad1 (the server's end): lets in what one of the others sent there
 *   metad_carry   tc egress, metad1: keeps the socket's mark from the veth
 *   metad_reply   tc ingress, metad0 (the host's end): the way back
 *   metad_host    tc egress, metad0: what the host itself sends there
 *
 * The two that see other people's traffic are filters; their second halves, from_port and
 * from_bridge, are reached through the program array `slots`, which is never pinned: the kernel
 * empties it when the last process that has it open dies, and from then on every packet is left
 * alone.
 *
 * Limits: Linux 5.10 (bpf_redirect_peer); no CO-RE, no atomics beyond -mcpu=v2. IPv4 only. A
 * fragment names no TCP port, so every TCP fragment for the address is taken.
 *
 * A "port" is a bridge's, a veth. TCP's ports are "sport" and "dport".
 */
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/ip.h>
#include <linux/in.h>
#include <linux/tcp.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define META_ADDR bpf_htonl(0xa9feaa02) /* 169.254.170.2: ECS task metadata endpoint */
#define META_DPORT bpf_htons(80)
/* Nothing listens there in the server's namespace: its TCP stack resets what is sent there. */
#define REFUSE_DPORT bpf_htons(1)

/* include/net/ip.h */
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

/* RFC 9293, 3.1: the byte with the flags, and some of them. */
#define TCP_FLAGS_OFFSET 13
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define TASK_ID_LEN 64
#define CONTAINER_LEN 64

/* What filter returns beside tc's answers: the packet may be ours, and no server is there. */
#define FILTER_UNSERVED (TC_ACT_VALUE_MAX + 1)

/* How long an address that no task holds stays with the port that used it last. Long enough for an
 * answer on its way, short enough for an address that moved. */
#define NEIGHBOUR_HOLD_NS (10ULL * 1000 * 1000 * 1000)
#define EVENT_INTERVAL_NS (1ULL * 1000 * 1000 * 1000)
/* How long after its SYN a handshake may still be under way: the client sends another one then. */
#define HANDSHAKE_NS (1ULL * 1000 * 1000 * 1000)
#define HANDSHAKES 4096

/* What an accepted socket's mark says about its sender. */
enum tag {
	TAG_NONE = 0, /* seen on a bridge device only, or the host's: nothing is proved */
	TAG_TASK = 0x00ffffff, /* the bits that number the task */
	TAG_CONTAINER = 0x7f000000, /* the bits that number the container in its task. 0: it may be
				       any of them */
	TAG_PORT = 0x80000000, /* the bit: no task yet, the rest is the ifindex of the port it came
				  in on */
};

/* The mark of a packet with TAG_NONE on its way to metad_enter, which drops what has no mark. */
#define MARK_UNPROVED TAG_PORT

/* An IPv4 address as a map's key: a __be32, in the way that bpftool shows it octet by octet. */
struct addr {
	__u8 octets[4];
};

struct task_value {
	__u32 tag;
	__u32 ifindex; /* host end of the task's veth */
	__u8 mac[ETH_ALEN];
	__u8 levels[2]; /* how far below the root its containers' cgroups are; 0: not looked at */
	char task_id[TASK_ID_LEN]; /* text, NUL padded, cut if longer */
};

/* A container, by its cgroup. */
struct container_value {
	__u32 tag; /* its task's and its own bits */
	__u32 pad;
	char task_id[TASK_ID_LEN]; /* text, as in task_value */
	char container[CONTAINER_LEN]; /* text: its name, NUL padded, cut if longer */
};

/* Where an address was last seen that no task holds. */
struct neighbour {
	enum tag tag; /* that its packets were given: TAG_PORT|ifindex, or TAG_NONE behind a bridge
			 device */
	__u32 ifindex; /* the port, or the bridge device */
	__u8 mac[ETH_ALEN];
	__u8 pad[2];
	__u64 seen_ns; /* bpf_ktime_get_ns of its last packet */
};

/* A connection that the server was asked for. */
struct handshake {
	struct addr addr; /* the client's */
	__be16 sport; /* its TCP port */
	__u8 pad[2];
	__u32 tag; /* that the SYN was given */
	__u32 ifindex; /* where it came in */
	__u64 begun_ns; /* bpf_ktime_get_ns */
};

/* What a task has sent to the endpoint. */
struct task_counters {
	__u64 packets;
	__u64 bytes; /* of frames */
	__u64 connections; /* SYNs */
	__u64 last_seen_ns; /* bpf_ktime_get_ns, no more exact than the tick */
	__u64 last_seen_tick; /* bpf_jiffies64 */
};

/* Why a packet ended as it did: one for each exit of each program. */
enum verdict {
	/* metad_port and metad_bridge */
	VERDICT_NOT_IPV4, /* left alone */
	VERDICT_NOT_META, /* left alone: another address, another protocol */
	VERDICT_VLAN, /* left alone */
	VERDICT_MALFORMED, /* left alone: no whole IPv4 or TCP header */
	VERDICT_OTHER_DPORT, /* left alone: not TCP port 80 */
	VERDICT_UNARMED, /* left alone: metad is not serving */
	VERDICT_UNARMED_DROP, /* dropped for the same reason, --on-exit=drop */
	VERDICT_UNARMED_HANDSHAKE, /* to the server all the same, which had its SYN a moment ago */

	VERDICT_PORT_TASK, /* to the server, with the task's tag: the container is not known */
	VERDICT_PORT_CONTAINER, /* to the server, with the container's tag */
	VERDICT_PORT_UNKNOWN, /* to the server, with the port's tag: no task has the address */
	VERDICT_PORT_WRONG_PORT, /* dropped: the address is a task's behind another port */
	VERDICT_PORT_WRONG_MAC, /* dropped: the task's address and port, not its MAC */
	VERDICT_PORT_CLAIMED, /* dropped: no task has the address, another port uses it just now */
	VERDICT_PORT_HOST, /* dropped: the address is that of the host's processes */
	VERDICT_PORT_AGENT, /* left alone: of a connection that the ECS agent has */

	VERDICT_BRIDGE_TASK, /* to the server, without a tag */
	VERDICT_BRIDGE_TRUSTED, /* to the server, with the task's tag: --trust-bridge */
	VERDICT_BRIDGE_UNKNOWN, /* to the server, without a tag: no task has the address */
	VERDICT_BRIDGE_WRONG_MAC, /* dropped: a task's address, not its MAC */
	VERDICT_BRIDGE_CLAIMED, /* dropped: no task has the address, another uses it now */
	VERDICT_BRIDGE_HOST, /* dropped: the address is that of the host's processes */
	VERDICT_BRIDGE_AGENT, /* left alone: of a connection that the ECS agent has */

	VERDICT_HOST, /* metad_host: to the server, from a process of the host, without a tag */
	VERDICT_HOST_CONTAINER, /* to the server, with the tag of a container in the host's network */
	VERDICT_HOST_REFUSED, /* reset: TCP for the endpoint, not from a process of the host */
	VERDICT_HOST_NOT_OURS, /* dropped: not TCP for the endpoint */

	VERDICT_ENTERED, /* metad_enter: into the server's namespace */
	VERDICT_ENTER_UNMARKED, /* dropped: none of the other programs sent it */
	VERDICT_CARRIED, /* metad_carry: on to metad_reply */
	VERDICT_REPLY_TASK, /* by the port of the task that has the address */
	VERDICT_REPLY_PORT, /* by the port the unknown address was seen on */
	VERDICT_REPLY_BRIDGE, /* by the bridge device the unknown address was seen on */
	VERDICT_REPLY_HOST, /* to the host's own stack */
	VERDICT_REPLY_REFUSED, /* to the host's own stack: the reset of a host_refused */
	VERDICT_REPLY_NOT_OURS, /* dropped: not TCP from 169.254.170.2 */
	VERDICT_REPLY_NOWHERE, /* dropped: nobody has the address */
	VERDICT_REPLY_NOT_THEIRS, /* to the server as a reset: the address has another owner since */

	VERDICT_COUNT,
	VERDICT_OPEN, /* none yet: the packet is for the server. Never counted */
};

struct verdict_count {
	__u64 packets;
};

/* One packet that somebody should hear of. */
struct event {
	__u64 time_ns; /* bpf_ktime_get_ns */
	__u64 held_back; /* packets of the same verdict that were not told since the last one */
	enum verdict verdict;
	__u32 ifindex; /* where it came in */
	__be32 addr; /* its source */
	__u8 mac[ETH_ALEN];
	__u8 pad[2];
};

/* In the order in which the kernel empties them: what a port lets pass must not be caught at its
 * bridge. */
enum slot {
	SLOT_BRIDGE,
	SLOT_PORT,
	SLOT_COUNT,
};

/* Set before load. */
volatile const __u32 layout_version = 3; /* of the pinned maps; a part of their pins' names */
volatile const __u32 metad0_ifindex;
volatile const __u8 trust_bridge; /* address and MAC are enough for a tag at a bridge device */
volatile const __u8 exit_drop; /* what metad leaves behind drops what it would have taken */
volatile const __be32 host_addr; /* metad0's: the host's processes ask from it, and nobody else */
/* As task_value's, of containers in the host's network. */
volatile const __u8 host_levels[2] = {2, 3};
volatile const __u32 server_netns; /* the host's id for the server's namespace */
volatile const __be32 agent_addr; /* where the ECS agent's rule sends what is for the endpoint */
volatile const __be16 agent_dport; /* 0: there is no agent */

/* Tasks by address. Only user space writes. Sized for several times the 1,021 tasks that one ECS
 * host can have addresses for; full: the next task is refused, those in it stay. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct task_value);
	__uint(max_entries, 16384);
} ip_task SEC(".maps");

/* Containers by the id of their cgroup (v2), which is the inode of its directory. Only user space
 * writes, and never the root's id: every socket has that one where v2 says nothing. Sized for a few
 * containers in each task of ip_task; full: the next container is named by its task only. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct container_value);
	__uint(max_entries, 65536);
} container_cgroup SEC(".maps");

/* The same for containers in the host's network. A map of its own, because no address says which
 * task they can belong to. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct container_value);
	__uint(max_entries, 4096);
} host_cgroup SEC(".maps");

/* Senders that no task is known for, for the way back. Anyone can fill it with made-up addresses;
 * the least recently used goes, and is learned again from its next packet. Tasks do not need it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct addr);
	__type(value, struct neighbour);
	__uint(max_entries, 16384);
} neighbours SEC(".maps");

/* The last connections that the server was asked for: those that may be half open when it goes.
 * Direct-mapped by a hash, the newest entry wins: a hash map would cost as much as all else that is
 * done for a SYN. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct handshake);
	__uint(max_entries, HANDSHAKES);
} handshakes SEC(".maps");

/* Entries are made and removed by user space with those of ip_task: as large, never larger. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct task_counters);
	__uint(max_entries, 16384);
} counters SEC(".maps");

/* An array's key must be an integer, not an enum, or the kernel keeps no type information of it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct verdict_count);
	__uint(max_entries, VERDICT_COUNT);
} verdicts SEC(".maps");

/* One event of a verdict per second: the smallest size that is a multiple of every architecture's
 * page holds minutes of them. Full: the event is held back and counted in the next. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__type(value, struct event);
	__uint(max_entries, 65536);
} events SEC(".maps");

struct event_gate {
	struct bpf_spin_lock lock;
	__u32 pad;
	__u64 next_ns; /* no event of this verdict before */
	__u64 held_back;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct event_gate);
	__uint(max_entries, VERDICT_COUNT);
} event_gates SEC(".maps");

/* The second halves of the filters. Never pinned: see above. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, enum slot);
	__type(value, __u32);
	__uint(max_entries, SLOT_COUNT);
} slots SEC(".maps");

struct sender {
	__be32 addr;
	__u8 mac[ETH_ALEN];
	__be16 sport; /* of TCP; 0: a fragment */
	__u8 syn;
	__u8 fin;
};

/* conclude counts how a packet ended, and returns tc's answer. */
static __always_inline int conclude(enum verdict v, int ret)
{
	__u32 key = v;
	struct verdict_count *n = bpf_map_lookup_elem(&verdicts, &key);

	if (n)
		n->packets++;
	return ret;
}

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	/* Bytes, not words: a map value's field may sit at any alignment, and v2 code has no
	 * unaligned loads. */
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) |
		 (a[5] ^ b[5]));
}

/* tell tells user space of a packet of verdict v from s, or that it was held back. */
static __always_inline void tell(struct __sk_buff *skb, const struct sender *s, enum verdict v)
{
	__u32 key = v;
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

/* filter sees all that containers send, and leaves most of it alone. Returns tc's answer, or
 * FILTER_UNSERVED; it does not return if a server is there. */
static __always_inline int filter(struct __sk_buff *skb, enum slot slot)
{
	const int headers = sizeof(struct ethhdr) + sizeof(struct iphdr);
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return conclude(VERDICT_NOT_IPV4, TC_ACT_UNSPEC);
	if ((void *)(ip + 1) > data_end) {
		if (bpf_skb_pull_data(skb, headers))
			return conclude(VERDICT_MALFORMED, TC_ACT_UNSPEC);
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		ip = data + sizeof(struct ethhdr);
		if ((void *)(ip + 1) > data_end)
			return conclude(VERDICT_MALFORMED, TC_ACT_UNSPEC);
	}
	if (ip->daddr != META_ADDR || ip->protocol != IPPROTO_TCP)
		return conclude(VERDICT_NOT_META, TC_ACT_UNSPEC);
	if (skb->vlan_present)
		return conclude(VERDICT_VLAN, TC_ACT_UNSPEC);
	/* The length adds nothing; that is for us to know and not for the verifier. A slot that it
	 * knew would be patched into the code, and emptying it would take a grace period for each
	 * program: time in which the one still sends what the other leaves alone to a server that
	 * is no more. */
	bpf_tail_call(skb, &slots, slot + (skb->len >> 31));
	/* The slot is empty. The TCP port is looked at only after the call, so that with exit_drop
	 * the address's other TCP ports lose nothing. */
	return FILTER_UNSERVED;
}

/* parse looks at the rest of a frame that passed the filter. Returns VERDICT_OPEN and the sender if
 * the frame is for the server, otherwise the verdict that says why it is not. */
static __always_inline enum verdict parse(struct __sk_buff *skb, struct sender *s)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct {
		__be16 source, dest;
		__u8 rest[TCP_FLAGS_OFFSET + 1 - 4];
	} tcp;

	if ((void *)(ip + 1) > data_end || ip->version != 4 || ip->ihl < 5)
		return VERDICT_MALFORMED;
	s->addr = ip->saddr;
	__builtin_memcpy(s->mac, eth->h_source, ETH_ALEN);
	s->sport = 0;
	s->syn = s->fin = 0;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return VERDICT_OPEN;
	if (bpf_skb_load_bytes(skb, sizeof(*eth) + ip->ihl * 4, &tcp, sizeof(tcp)))
		return VERDICT_MALFORMED;
	if (tcp.dest != META_DPORT)
		return VERDICT_OTHER_DPORT;
	s->sport = tcp.source;
	s->syn = (tcp.rest[TCP_FLAGS_OFFSET - 4] & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	s->fin = tcp.rest[TCP_FLAGS_OFFSET - 4] & TCP_FIN;
	return VERDICT_OPEN;
}

/* connection returns the state of s's connection to addr:dport in the namespace, 0 if there is none. */
static __always_inline int connection(struct __sk_buff *skb, const struct sender *s, __be32 addr,
				      __be16 dport, __u64 netns)
{
	struct bpf_sock_tuple tuple = {
	    .ipv4 = {.saddr = s->addr, .sport = s->sport, .daddr = addr, .dport = dport},
	};
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), netns, 0);
	int state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_LISTEN ? 0 : state;
}

/* is_agents says whether the packet belongs to a connection that the agent has and the server has not.
 * Connections that the agent accepted while metad was away stay the agent's: the server would reset
 * them. A connection that neither has is reset by the server, so that its client fails at once. The
 * agent's TIME_WAIT counts for the last FIN only: the client may use the TCP port again. */
static __always_inline int is_agents(struct __sk_buff *skb, const struct sender *s)
{
	int state;

	if (s->syn || !s->sport || !agent_dport)
		return 0;
	state = connection(skb, s, agent_addr, agent_dport, BPF_F_CURRENT_NETNS);
	if (!state || (state == BPF_TCP_TIME_WAIT && !s->fin))
		return 0;
	return !connection(skb, s, META_ADDR, META_DPORT, server_netns);
}

/* handshake_of returns the place of s's connection, which may hold another's. */
static __always_inline struct handshake *handshake_of(const struct sender *s)
{
	__u32 key = (s->addr ^ s->sport) * 0x9e3779b1; /* 2^32 by the golden ratio: spreads them */

	key = (key ^ key >> 16) % HANDSHAKES;
	return bpf_map_lookup_elem(&handshakes, &key);
}

static __always_inline int deliver(struct __sk_buff *skb, const struct sender *s, __u32 tag,
				   enum verdict v)
{
	struct handshake *h = s->syn ? handshake_of(s) : NULL;

	if (h) {
		/* Two CPUs at once may leave a mixture of both: metad_reply drops the answer to a
		 * packet that got a wrong tag from it. */
		__builtin_memcpy(&h->addr, &s->addr, sizeof(h->addr));
		h->sport = s->sport;
		h->tag = tag;
		h->ifindex = skb->ifindex;
		h->begun_ns = bpf_ktime_get_ns();
	}
	skb->mark = tag ? tag : MARK_UNPROVED;
	/* The frame is addressed to the bridge: for the stack it would be another host's. */
	bpf_skb_change_type(skb, PACKET_HOST);
	return conclude(v, bpf_redirect_peer(metad0_ifindex, 0));
}

static __always_inline int refuse(struct __sk_buff *skb, const struct sender *s, enum verdict v)
{
	tell(skb, s, v);
	return conclude(v, TC_ACT_SHOT);
}

static __always_inline void count(struct __sk_buff *skb, const struct sender *s)
{
	struct task_counters *c = bpf_map_lookup_elem(&counters, &s->addr);
	__u64 tick = bpf_jiffies64();

	if (!c)
		return;
	c->packets++;
	c->bytes += skb->len;
	c->connections += s->syn;
	if (c->last_seen_tick == tick)
		return; /* reading the clock is a tenth of all that is done for a packet */
	c->last_seen_tick = tick;
	c->last_seen_ns = bpf_ktime_get_ns();
}

/* learn notes where an unknown sender is, for the way back. It does not move an address that is in
 * use: a container that claims its neighbour's address would get the neighbour's answers. A port is
 * proof and wins over a bridge device. Returns 0 if the packet may go on. */
static __always_inline int learn(struct __sk_buff *skb, const struct sender *s, __u32 tag)
{
	struct neighbour *had = bpf_map_lookup_elem(&neighbours, &s->addr);
	__u64 now = bpf_ktime_get_ns();
	struct neighbour n = {
	    .tag = tag,
	    .ifindex = skb->ifindex,
	    .seen_ns = now,
	};

	if (had) {
		int same =
		    had->ifindex == skb->ifindex && (tag != TAG_NONE || same_mac(had->mac, s->mac));
		int stronger = had->tag == TAG_NONE && tag != TAG_NONE;

		if (!same && !stronger && now - had->seen_ns < NEIGHBOUR_HOLD_NS)
			return -1;
		if (same && same_mac(had->mac, s->mac)) {
			had->seen_ns = now;
			return 0;
		}
	}
	__builtin_memcpy(n.mac, s->mac, ETH_ALEN);
	bpf_map_update_elem(&neighbours, &s->addr, &n, BPF_ANY);
	return 0;
}

/* container_at returns the tag of the container in whose cgroup, that many levels below the root, the
 * packet's socket was made; also below it, where a container may make cgroups of its own. 0: there is
 * none, or the packet has no socket because it was forwarded. */
static __always_inline __u32 container_at(struct __sk_buff *skb, void *map, __u8 level)
{
	__u64 id = level ? bpf_skb_ancestor_cgroup_id(skb, level) : 0;
	struct container_value *c = id ? bpf_map_lookup_elem(map, &id) : NULL;

	return c ? c->tag : 0;
}

/* tag_of returns the tag of the container that sent the packet, if it is one of the task's, else the
 * task's. Two levels and no loop: not every kernel that metad runs on loads a loop here. */
static __always_inline __u32 tag_of(struct __sk_buff *skb, const struct task_value *t)
{
	__u32 tag = container_at(skb, &container_cgroup, t->levels[0]);

	if (!tag)
		tag = container_at(skb, &container_cgroup, t->levels[1]);
	return (tag & ~TAG_CONTAINER) == t->tag ? tag : t->tag;
}

SEC("tc")
int from_port(struct __sk_buff *skb)
{
	struct sender s = {};
	enum verdict v = parse(skb, &s);
	struct task_value *t;
	__u32 tag;

	if (v != VERDICT_OPEN)
		return conclude(v, TC_ACT_UNSPEC);
	if (s.addr == host_addr)
		return refuse(skb, &s, VERDICT_PORT_HOST);
	t = bpf_map_lookup_elem(&ip_task, &s.addr);
	if (t) {
		if (t->ifindex != skb->ifindex)
			return refuse(skb, &s, VERDICT_PORT_WRONG_PORT);
		if (!same_mac(t->mac, s.mac))
			return refuse(skb, &s, VERDICT_PORT_WRONG_MAC);
		if (is_agents(skb, &s))
			return conclude(VERDICT_PORT_AGENT, TC_ACT_UNSPEC);
		count(skb, &s);
		tag = tag_of(skb, t);
		return deliver(skb, &s, tag,
			       tag == t->tag ? VERDICT_PORT_TASK : VERDICT_PORT_CONTAINER);
	}
	if (is_agents(skb, &s))
		return conclude(VERDICT_PORT_AGENT, TC_ACT_UNSPEC);
	tag = TAG_PORT | skb->ifindex;
	if (learn(skb, &s, tag))
		return refuse(skb, &s, VERDICT_PORT_CLAIMED);
	tell(skb, &s, VERDICT_PORT_UNKNOWN);
	return deliver(skb, &s, tag, VERDICT_PORT_UNKNOWN);
}

SEC("tc")
int from_bridge(struct __sk_buff *skb)
{
	struct sender s = {};
	enum verdict v = parse(skb, &s);
	struct task_value *t;

	if (v != VERDICT_OPEN)
		return conclude(v, TC_ACT_UNSPEC);
	if (s.addr == host_addr)
		return refuse(skb, &s, VERDICT_BRIDGE_HOST);
	t = bpf_map_lookup_elem(&ip_task, &s.addr);
	if (t) {
		if (!same_mac(t->mac, s.mac))
			return refuse(skb, &s, VERDICT_BRIDGE_WRONG_MAC);
		if (is_agents(skb, &s))
			return conclude(VERDICT_BRIDGE_AGENT, TC_ACT_UNSPEC);
		count(skb, &s);
		if (trust_bridge)
			return deliver(skb, &s, t->tag, VERDICT_BRIDGE_TRUSTED);
		return deliver(skb, &s, TAG_NONE, VERDICT_BRIDGE_TASK);
	}
	if (is_agents(skb, &s))
		return conclude(VERDICT_BRIDGE_AGENT, TC_ACT_UNSPEC);
	if (learn(skb, &s, TAG_NONE))
		return refuse(skb, &s, VERDICT_BRIDGE_CLAIMED);
	tell(skb, &s, VERDICT_BRIDGE_UNKNOWN);
	return deliver(skb, &s, TAG_NONE, VERDICT_BRIDGE_UNKNOWN);
}

/* unserved decides about a packet for the endpoint while no server takes packets.
 *
 * A client whose SYN reached the server believes that it is connected once it has the SYN-ACK. If its
 * next packets were left alone, no host would know the connection, and the client might never hear
 * so: where conntrack remembers the client's TCP port from a connection to the agent, it calls the
 * packets invalid, and they are lost until the client gives up. The server's namespace lasts a little
 * longer than the server: it resets such a connection, or goes on with it during a stop. */
static __always_inline int unserved(struct __sk_buff *skb)
{
	struct sender s = {};
	enum verdict v = parse(skb, &s);
	struct handshake *h;

	if (v != VERDICT_OPEN)
		return conclude(v, TC_ACT_UNSPEC);
	h = s.sport ? handshake_of(&s) : NULL;
	if (h && h->sport == s.sport && !__builtin_memcmp(&h->addr, &s.addr, sizeof(h->addr))) {
		if (s.syn)
			h->sport = 0; /* the new SYN goes elsewhere, and so does what follows it */
		else if (h->ifindex == skb->ifindex &&
			 bpf_ktime_get_ns() - h->begun_ns < HANDSHAKE_NS)
			return deliver(skb, &s, h->tag, VERDICT_UNARMED_HANDSHAKE);
	}
	if (exit_drop)
		return conclude(VERDICT_UNARMED_DROP, TC_ACT_SHOT);
	return conclude(VERDICT_UNARMED, TC_ACT_UNSPEC);
}

SEC("tc")
int metad_port(struct __sk_buff *skb)
{
	int ret = filter(skb, SLOT_PORT);

	return ret == FILTER_UNSERVED ? unserved(skb) : ret;
}

SEC("tc")
int metad_bridge(struct __sk_buff *skb)
{
	int ret = filter(skb, SLOT_BRIDGE);

	return ret == FILTER_UNSERVED ? unserved(skb) : ret;
}

/* set_tcp_port writes one of the packet's TCP ports, sport or dport, at the offset in its TCP header. */
static __always_inline int set_tcp_port(struct __sk_buff *skb, int tcp, int offset, __be16 from,
					__be16 to)
{
	if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), from, to, sizeof(to)))
		return -1;
	return bpf_skb_store_bytes(skb, tcp + offset, &to, sizeof(to), 0);
}

/* to_server sends a packet of the host's route to the server's namespace. The veth would take its mark
 * off: by metad0's ingress and from there by bpf_redirect_peer, in metad_reply, the mark stays. */
static __always_inline int to_server(struct __sk_buff *skb, __u32 tag, enum verdict v)
{
	skb->mark = tag ? tag : MARK_UNPROVED;
	return conclude(v, bpf_redirect(metad0_ifindex, BPF_F_INGRESS));
}

/* The host's route to the endpoint leads here. It is for the host's own processes: what the host forwards
 * (a container on a bridge that is not watched, another host) has no proof. It is refused, so that its
 * client fails at once: the server's namespace resets what is sent to a TCP port that is closed there. */
SEC("tc")
int metad_host(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	struct tcphdr *tcp = (void *)(ip + 1);
	__u32 tag;

	if (skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > data_end ||
	    ip->daddr != META_ADDR || ip->protocol != IPPROTO_TCP)
		return conclude(VERDICT_HOST_NOT_OURS, TC_ACT_SHOT);
	if (ip->saddr == host_addr && !skb->ingress_ifindex) {
		tag = container_at(skb, &host_cgroup, host_levels[0]);
		if (!tag)
			tag = container_at(skb, &host_cgroup, host_levels[1]);
		return to_server(skb, tag, tag ? VERDICT_HOST_CONTAINER : VERDICT_HOST);
	}
	if (ip->ihl != 5 || ip->frag_off & bpf_htons(IP_MF | IP_OFFSET) ||
	    (void *)(tcp + 1) > data_end || tcp->dest != META_DPORT ||
	    set_tcp_port(skb, sizeof(struct ethhdr) + sizeof(*ip), offsetof(struct tcphdr, dest),
			 META_DPORT, REFUSE_DPORT))
		return conclude(VERDICT_HOST_NOT_OURS, TC_ACT_SHOT);
	return to_server(skb, TAG_NONE, VERDICT_HOST_REFUSED);
}

/* What was proved comes with a mark. A packet that a process puts on metad0 past its egress hook
 * (AF_PACKET with PACKET_QDISC_BYPASS) comes without one: the veth takes it off. */
SEC("tc")
int metad_enter(struct __sk_buff *skb)
{
	if (!skb->mark)
		return conclude(VERDICT_ENTER_UNMARKED, TC_ACT_SHOT);
	if (skb->mark == MARK_UNPROVED)
		skb->mark = TAG_NONE;
	return conclude(VERDICT_ENTERED, TC_ACT_UNSPEC);
}

/* The frame from metad1 to metad0 needs no destination MAC (there is one receiver, and metad_reply
 * writes the real one), so it carries the mark, which the veth scrubs: metad_reply then knows
 * whose connection an answer belongs to. */
struct carrier {
	__u8 prefix[2]; /* unicast, locally administered */
	__be32 tag;
} __attribute__((packed));

SEC("tc")
int metad_carry(struct __sk_buff *skb)
{
	struct carrier c = {.prefix = {0x02, 0}, .tag = bpf_htonl(skb->mark)};

	bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_dest), &c, sizeof(c), 0);
	return conclude(VERDICT_CARRIED, TC_ACT_UNSPEC);
}

static __always_inline int leave(struct __sk_buff *skb, __u32 ifindex, const __u8 *mac,
				 enum verdict v)
{
	bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_dest), mac, ETH_ALEN, 0);
	bpf_skb_change_type(skb, PACKET_HOST); /* as in deliver */
	if (v == VERDICT_REPLY_BRIDGE)
		return conclude(v, bpf_redirect(ifindex, 0));
	return conclude(v, bpf_redirect_peer(ifindex, 0));
}

/* hang_up ends the server's connection that the packet is of, whose client is gone: the packet goes
 * back as the reset that the client's stack would have sent. Left alone, the connection would wait
 * for that client for seconds, and the address's next owner could not connect from the same TCP port:
 * to its SYN the old connection answers, and that answer is not for it either.
 *
 * Addresses, ports, and the two sequence numbers change places. That leaves the checksums as they
 * are, and puts the reset exactly where the server expects the next byte. */
static __always_inline int hang_up(struct __sk_buff *skb, const struct iphdr *ip)
{
	const int tcp = sizeof(struct ethhdr) + sizeof(struct iphdr);
	const int at = tcp - 2 * (int)sizeof(__be32);
	struct {
		__be32 saddr, daddr;
		__be16 sport, dport;
		__be32 seq, ack;
		__be16 flags; /* and the header's length, in the high byte */
	} __attribute__((packed)) was, reset;

	if (ip->ihl != 5 || ip->frag_off & bpf_htons(IP_MF | IP_OFFSET) ||
	    bpf_skb_load_bytes(skb, at, &was, sizeof(was)) || was.flags & bpf_htons(TCP_RST) ||
	    !(was.flags & bpf_htons(TCP_ACK)))
		goto drop;
	reset.saddr = was.daddr;
	reset.daddr = was.saddr;
	reset.sport = was.dport;
	reset.dport = was.sport;
	reset.seq = was.ack;
	reset.ack = was.seq;
	reset.flags = (was.flags & bpf_htons(0xff00)) | bpf_htons(TCP_RST | TCP_ACK);
	if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), was.flags, reset.flags,
				sizeof(reset.flags)) ||
	    bpf_skb_store_bytes(skb, at, &reset, sizeof(reset), 0))
		goto drop;
	skb->mark = MARK_UNPROVED;
	bpf_skb_change_type(skb, PACKET_HOST);
	return conclude(VERDICT_REPLY_NOT_THEIRS, bpf_redirect_peer(metad0_ifindex, 0));
drop:
	return conclude(VERDICT_REPLY_NOT_THEIRS, TC_ACT_SHOT);
}

SEC("tc")
int metad_reply(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct tcphdr *tcp;
	struct neighbour *n;
	struct task_value *t;
	__u32 tag;
	__be32 dst;

	if (skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > data_end ||
	    ip->protocol != IPPROTO_TCP)
		return conclude(VERDICT_REPLY_NOT_OURS, TC_ACT_SHOT);
	/* From metad_host, which has counted it. What comes from the server has no mark. */
	if (skb->mark && ip->daddr == META_ADDR) {
		bpf_skb_change_type(skb, PACKET_HOST);
		return bpf_redirect_peer(metad0_ifindex, 0);
	}
	if (ip->saddr != META_ADDR)
		return conclude(VERDICT_REPLY_NOT_OURS, TC_ACT_SHOT);
	tag = bpf_ntohl(((struct carrier *)eth->h_dest)->tag);
	dst = ip->daddr;
	tcp = (void *)(ip + 1);
	if (ip->ihl == 5 && (void *)(tcp + 1) <= data_end && tcp->source == REFUSE_DPORT) {
		set_tcp_port(skb, sizeof(*eth) + sizeof(*ip), offsetof(struct tcphdr, source),
			     REFUSE_DPORT, META_DPORT);
		bpf_skb_change_type(skb, PACKET_HOST);
		return conclude(VERDICT_REPLY_REFUSED, TC_ACT_UNSPEC);
	}
	/* Only the host's processes were let in with this address. */
	if (dst == host_addr) {
		bpf_skb_change_type(skb, PACKET_HOST);
		return conclude(VERDICT_REPLY_HOST, TC_ACT_UNSPEC);
	}
	/* Tasks first: once an address is a task's, what goes there leaves by that task's port. And
	 * only what belongs there: a connection outlives its client, and its address may be
	 * another's by then. */
	t = bpf_map_lookup_elem(&ip_task, &dst);
	if (t) {
		if (tag == TAG_NONE || (tag & ~TAG_CONTAINER) == t->tag ||
		    tag == (TAG_PORT | t->ifindex))
			return leave(skb, t->ifindex, t->mac, VERDICT_REPLY_TASK);
		return hang_up(skb, ip);
	}
	n = bpf_map_lookup_elem(&neighbours, &dst);
	if (!n)
		return conclude(VERDICT_REPLY_NOWHERE, TC_ACT_SHOT);
	if (tag != TAG_NONE && tag != n->tag)
		return hang_up(skb, ip);
	return leave(skb, n->ifindex, n->mac,
		     n->tag == TAG_NONE ? VERDICT_REPLY_BRIDGE : VERDICT_REPLY_PORT);
}

char _license[] SEC("license") = "GPL";
