package main

import (
	"time"

	"go.uber.org/zap"
)

// config holds the values of all flags of `metad serve`. A flag wins over the environment
// (METAD_*, then the ECS_* name with the same meaning), and the environment over the file.
type config struct {
	file configFile
	// values has the text of each flag's value, for a comparison
	values map[string]string
	level  zap.AtomicLevel // of the log

	bridges      []string
	pinDir       string
	attach       string
	trustBridge  bool
	onExit       string
	hostRoute    string
	maxAddresses int

	dockerHost string
	bundleDirs []string
	reconcile  time.Duration
	cluster    string
	region     string
	account    string
	launchType string
	az         string
	disableAZ  bool

	agentURL      string
	introspection string // the agent's, which metad reads
	introspect    string // metad's own address

	unknownWait time.Duration
	rpsLimit    string
	maxConns    int

	statsSource    string
	disableMetrics bool
	ownIDsOnly     bool

	adminAddr        string
	adminGroup       string
	pprof            bool
	containerMetrics bool

	dataDir       string
	proxySocket   string
	fileEnabled   bool
	fileAgentPath bool
	metadataURIs  bool
	nri           string
	nriSocket     string
	selinux       bool
	runDir        string

	logLevel  string
	logFormat string
}
