/*
 * What metad's tc programs share with user space: the types, the configuration and the maps.
 * bpf2go generates Go from the types, so each name here is also a name there.
 *
 * A "port" is the port of a bridge: a veth. The ports of TCP are "sport" and "dport".
 */
#ifndef METAD_H
#define METAD_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

#define TASK_ID_LEN 64
#define CONTAINER_LEN 64
/* The handshakes in all, in groups of so many. Devices that share a group, by their ifindex, push
 * only each other's out. */
#define HANDSHAKES 4096
#define HANDSHAKES_OF_A_GROUP 64
/* The addresses without a task that a port can have at once: a container has one or two. */
#define NEIGHBOURS_OF_A_PORT 8

/* The mark of an accepted socket: what is proved about the sender. */
enum tag {
	TAG_NONE = 0, /* nothing: the host sent it, or only a bridge device saw it */
	TAG_TASK = 0x00ffffff, /* these bits: the task's number */
	TAG_CONTAINER = 0x7f000000, /* these bits: the container's number in its task; 0: unknown */
	TAG_PORT = 0x80000000, /* this bit: no task yet; the other bits are the port's ifindex */
};

/* The mark that stands for TAG_NONE on the way to metad_enter, which drops what has no mark. */
#define MARK_UNPROVED TAG_PORT

/* An IPv4 address as the key of a map. It is a __be32, but bpftool prints octets legibly. */
struct addr {
	__u8 octets[4];
};

struct task_value {
	__u32 tag;
	__u32 ifindex; /* host end of the task's veth */
	__u8 mac[ETH_ALEN];
	__u8 levels[2]; /* depths of its containers' cgroups below the root; 0: none */
	char task_id[TASK_ID_LEN]; /* text, NUL padded, cut if longer */
};

/* A container, by its cgroup. */
struct container_value {
	__u32 tag; /* the bits of its task and its own bits */
	__u32 pad;
	char task_id[TASK_ID_LEN]; /* text, as in task_value */
	char container[CONTAINER_LEN]; /* text: its name, NUL padded, cut if longer */
};

/* The place of an address that no task holds. */
struct neighbour {
	enum tag tag; /* its packets' tag: TAG_PORT|ifindex, or TAG_NONE behind a bridge device */
	__u32 ifindex; /* the port, or the bridge device */
	__u8 mac[ETH_ALEN];
	__u8 pad[2];
	struct addr addr;
	__u32 pad2;
	__u64 seen_ns; /* bpf_ktime_get_ns of its last packet; 0 on a port */
};

/* One of the places that a port has for addresses without a task. */
struct neighbour_place {
	__u32 ifindex;
	__u32 place; /* by the address */
};

/* A SYN that went to the server. */
struct handshake {
	struct addr addr; /* the client's */
	__be16 sport; /* the client's TCP port */
	__u8 pad[2];
	__u32 tag; /* the SYN's tag */
	__u32 ifindex; /* the device that it came in on */
	__u64 begun_ns; /* bpf_ktime_get_ns */
};

/* What a task has sent to the endpoint. */
struct task_counters {
	__u64 packets;
	__u64 bytes; /* of frames */
	__u64 connections; /* SYNs */
	__u64 last_seen_ns; /* bpf_ktime_get_ns, as exact as a tick */
	__u64 last_seen_tick; /* bpf_jiffies64 */
};

/* How a packet ended: one verdict for each exit of each program. */
enum verdict {
	/* metad_port and metad_bridge */
	VERDICT_NOT_IPV4, /* left alone */
	VERDICT_NOT_META, /* left alone: another address, another protocol */
	VERDICT_VLAN, /* left alone */
	VERDICT_MALFORMED, /* left alone: no whole IPv4 or TCP header */
	VERDICT_OTHER_DPORT, /* left alone: not TCP port 80 */
	VERDICT_UNARMED, /* left alone: metad is not serving */
	VERDICT_UNARMED_DROP, /* dropped: metad is not serving, and --on-exit=drop */
	VERDICT_UNARMED_OPEN, /* to the server: of a connection that it has, or had a moment ago */

	VERDICT_PORT_TASK, /* to the server, with the task's tag: the container is not known */
	VERDICT_PORT_CONTAINER, /* to the server, with the container's tag */
	VERDICT_PORT_UNKNOWN, /* to the server, with the port's tag: no task has the address */
	VERDICT_PORT_WRONG_PORT, /* dropped: the address is a task's behind another port */
	VERDICT_PORT_WRONG_MAC, /* dropped: the task's address and port, not its MAC */
	VERDICT_PORT_HOST, /* dropped: the address is that of the host's processes */
	VERDICT_PORT_BUSY, /* dropped: a new connection of a sender that has too many */
	VERDICT_PORT_AGENT, /* left alone: of a connection that the ECS agent has or is to have */

	VERDICT_BRIDGE_TASK, /* to the server, without a tag */
	VERDICT_BRIDGE_TRUSTED, /* to the server, with the task's tag: --trust-bridge */
	VERDICT_BRIDGE_UNKNOWN, /* to the server, without a tag: no task has the address */
	VERDICT_BRIDGE_WRONG_MAC, /* dropped: a task's address, not its MAC */
	VERDICT_BRIDGE_CLAIMED, /* dropped: no task has the address, another sender uses it now */
	VERDICT_BRIDGE_HOST, /* dropped: the address is that of the host's processes */
	VERDICT_BRIDGE_AGENT, /* left alone: of a connection that the ECS agent has or is to have */

	VERDICT_HOST, /* metad_host: to the server, from a process of the host, without a tag */
	VERDICT_HOST_CONTAINER, /* to the server, with a tag: a container in the host's network */
	VERDICT_HOST_REFUSED, /* reset: TCP for the endpoint, not from a process of the host */
	VERDICT_HOST_NOT_OURS, /* dropped: not TCP for the endpoint */

	VERDICT_ENTERED, /* metad_enter: into the server's namespace */
	VERDICT_ENTER_UNMARKED, /* dropped: none of the other programs sent it */
	VERDICT_CARRIED, /* metad_carry: on to metad_reply */
	VERDICT_REPLY_TASK, /* by the port of the task that has the address */
	VERDICT_REPLY_PORT, /* by the port that the unknown address was seen on */
	VERDICT_REPLY_BRIDGE, /* by the bridge device that the unknown address was seen on */
	VERDICT_REPLY_HOST, /* to the host's own stack */
	VERDICT_REPLY_REFUSED, /* to the host's own stack: the reset of a host_refused */
	VERDICT_REPLY_NOT_OURS, /* dropped: not TCP from 169.254.170.2 */
	VERDICT_REPLY_NOWHERE, /* dropped: the address is not known */
	VERDICT_REPLY_NOT_THEIRS, /* reset at the server: the address has a new owner */

	VERDICT_COUNT,
	VERDICT_OPEN, /* none yet: the packet is for the server. Never counted */
};

struct verdict_count {
	__u64 packets;
};

/* In the order in which the kernel empties them: a packet that a port lets pass must not be taken
 * at its bridge. */
enum slot {
	SLOT_BRIDGE,
	SLOT_PORT,
	SLOT_COUNT,
};

/* Set before load. */
volatile const __u32 layout_version = 5; /* of the pinned maps; a part of their pins' names */
volatile const __u32 metad0_ifindex;
volatile const __u8 trust_bridge; /* address and MAC are enough for a tag at a bridge device */
volatile const __u8 exit_drop; /* while metad is away, packets for the endpoint are dropped */
volatile const __be32 host_addr; /* of metad0: the source address of the host's own processes */
/* As levels in task_value, for containers in the host's network. */
volatile const __u8 host_levels[2] = {2, 3};
volatile const __u32 server_netns; /* the host's id for the server's namespace */
volatile const __be32 agent_addr; /* where the ECS agent's rule sends what is for the endpoint */
volatile const __be16 agent_dport; /* 0: there is no agent */

/* Tasks by address. Only user space writes. The size is several times the 1,021 tasks that one ECS
 * host can have addresses for. Full: the next task is refused, and those in the map stay. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct task_value);
	__uint(max_entries, 16384);
} ip_task SEC(".maps");

/* Containers by the id of their cgroup (v2), which is the inode of its directory. Only user space
 * writes. The root's id is never in it, because without v2 every socket has that id. The size is a
 * few containers for each task of ip_task. Full: the next container is named by its task only. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct container_value);
	__uint(max_entries, 65536);
} container_cgroup SEC(".maps");

/* The same for containers in the host's network. They have a map of their own, because no address
 * says which task they can belong to. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct container_value);
	__uint(max_entries, 4096);
} host_cgroup SEC(".maps");

/* The way back to senders without a task that only a bridge device has seen. Behind a port without
 * a hook a sender can fill the map with made-up addresses: the least recently used entry goes, and
 * is learned again from its next packet. Tasks do not need it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct addr);
	__type(value, struct neighbour);
	__uint(max_entries, 16384);
} neighbours SEC(".maps");

/* The same for ports. Each port has places of its own, so no container can claim an address that
 * another one uses, or push another one's entry out. The size is that of 1,024 ports that ask at
 * once before their tasks are known. Full: the least recently used entry goes. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct neighbour_place);
	__type(value, struct neighbour);
	__uint(max_entries, 8192);
} port_neighbours SEC(".maps");

/* Addresses of containers that the Engine lists but answers no inspect of: only the ECS agent may
 * know them. Only user space writes. Full: the next container is an unknown sender. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, __u8); /* nothing */
	__uint(max_entries, 4096);
} left_alone SEC(".maps");

/* Until when (bpf_ktime_get_ns) new connections with a tag are dropped, because the server has
 * refused one: whoever has it has too many. Only user space writes. Full: the least recently used
 * entry goes, and the server refuses once more. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1024);
} busy SEC(".maps");

/* The last SYNs that went to the server: these connections may be half open when it goes.
 * Direct-mapped by device and hash; the newest entry wins. A hash map would cost as much as all
 * other work for a SYN. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct handshake);
	__uint(max_entries, HANDSHAKES);
} handshakes SEC(".maps");

/* User space makes and removes an entry together with that of ip_task. So it has the same size. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct task_counters);
	__uint(max_entries, 16384);
} counters SEC(".maps");

/* The key of an array must be an integer: for an enum the kernel keeps no type information. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct verdict_count);
	__uint(max_entries, VERDICT_COUNT);
} verdicts SEC(".maps");

/* The second halves of the filters. Never pinned: see the top of metad.bpf.c. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, enum slot);
	__type(value, __u32);
	__uint(max_entries, SLOT_COUNT);
} slots SEC(".maps");

#endif
