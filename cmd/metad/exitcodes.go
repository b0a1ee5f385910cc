package main

import (
	"fmt"
	"strings"

	"metad/pkg/doctor"
)

// Exit codes. Those of reports are doctor.Status.
const (
	codeOK    = int(doctor.OK)
	codeError = 1
)

// exitCode is what an exit code means.
type exitCode struct {
	code     int
	commands string // that end with it
	means    string
}

// exitCodes are all that metad ends with. The help and the reference show them.
var exitCodes = []exitCode{
	{codeOK, "all", "done; serve: ended as asked, or another metad has taken over; " +
		"doctor, explain: nothing is wrong"},
	{codeError, "all", `an error, on stderr after "metad:"`},
	{int(doctor.Warn), "doctor, explain", "something is worth a look; stderr is empty"},
	{int(doctor.Fail), "doctor, explain", "metad does not work here, or the container is " +
		"not answered"},
}

// exitCodeHelp is exitCodes as text.
func exitCodeHelp() string {
	var b strings.Builder
	b.WriteString("Exit codes:\n")
	for _, c := range exitCodes {
		fmt.Fprintf(&b, "%d  %-15s  %s\n", c.code, c.commands, c.means)
	}
	return strings.TrimSpace(b.String())
}

// exitError is an error with an exit code of its own; a nil error prints nothing.
type exitError struct {
	error
	code int
}

func (e exitError) Error() string {
	if e.error == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.error.Error()
}
