package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"metad/bpf"
)

// pose tries what a container that may administer its network and trace its processes can do to be
// told another container of its task as self. It prints what it was told each time, and what it
// could do that it must not be able to.
func pose() error {
	if len(os.Args) != 4 {
		return errors.New("pose: want a tag and a process id")
	}
	tag, err := strconv.ParseUint(os.Args[2], 10, 32)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(os.Args[3])
	if err != nil {
		return err
	}
	// The mark of its packets is what it likes: every container's tag of the task, and a
	// port's.
	for n := range bpf.Containers + 1 {
		if err := askMarked(bpf.ContainerTag(uint32(tag), n)); err != nil {
			return err
		}
	}
	if err := askMarked(bpf.TagPort | 1); err != nil {
		return err
	}
	// Its cgroup is what it was made for: the hierarchy cannot be written to.
	if unix.Mount("cgroup2", "/tmp", "cgroup2", 0, "") == nil {
		fmt.Println("cgroup v2 mounted")
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil
		}
		if os.WriteFile(path, []byte("0"), 0) == nil {
			fmt.Println("moved by", path)
		}
		if os.Mkdir(filepath.Join(filepath.Dir(path), "mine"), 0o755) == nil {
			fmt.Println("cgroup made beside", path)
		}
		return nil
	})
	// Another container's processes do not exist here.
	if syscall.PtraceAttach(pid) == nil {
		fmt.Println("traced", pid)
	}
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		fmt.Println("process found", fd)
	}
	return nil
}

// askMarked asks who asks by a socket with the mark.
func askMarked(mark uint32) error {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	client := &http.Client{Transport: &http.Transport{DialContext: d.DialContext,
		DisableKeepAlives: true}}
	resp, err := client.Get(endpoint + "/v4/self")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	fmt.Printf("%d %s\n", resp.StatusCode, b)
	return err
}
