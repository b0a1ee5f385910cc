// Prints what OpenTelemetry's detector for ECS finds, as JSON.
const { awsEcsDetector } = require('@opentelemetry/resource-detector-aws');
const { detectResources } = require('@opentelemetry/resources');

const resource = detectResources({ detectors: [awsEcsDetector] });
resource.waitForAsyncAttributes().then(() => console.log(JSON.stringify(resource.attributes)));
