"""The keys that the files below cluster/ may have, as closed JSON schemas.

They are written from the references of KubeRay 1.7 (`ray.io/v1`), of Kubernetes' pods and network
policies (`v1`) and of SkyPilot 0.14, and hold the part that our files use. A key that stands in
none of these is misspelt, or is to be added here after a look into the reference.
"""

from typing import Any

TEXT = {"type": "string", "minLength": 1}
NUMBER = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def table(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these keys and no other."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


def some(item: dict[str, Any]) -> dict[str, Any]:
    """A list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


METADATA = table("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
RESOURCES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = table(
    "name",
    "image",
    "resources",
    name=NAME,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    env=some(table("name", "value", name=TEXT, value={"type": "string"})),
    securityContext=table(
        allowPrivilegeEscalation=FLAG,
        readOnlyRootFilesystem=FLAG,
        capabilities=table(add=some(TEXT), drop=some(TEXT)),
    ),
    resources=table("requests", "limits", requests=RESOURCES, limits=RESOURCES),
    volumeMounts=some(
        table("name", "mountPath", name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)
    ),
)
VOLUME = table(
    "name",
    name=NAME,
    persistentVolumeClaim=table("claimName", claimName=NAME, readOnly=FLAG),
    configMap=table("name", name=NAME, defaultMode=NUMBER),
    emptyDir=table(medium=one_of("Memory"), sizeLimit=QUANTITY),
)
POD = table(
    "spec",
    metadata=table(labels=TEXTS, annotations=TEXTS),
    spec=table(
        "containers",
        "securityContext",
        serviceAccountName=NAME,
        terminationGracePeriodSeconds=NUMBER,
        nodeSelector=TEXTS,
        securityContext=table(
            runAsNonRoot=FLAG,
            runAsUser=NUMBER,
            runAsGroup=NUMBER,
            fsGroup=NUMBER,
            seccompProfile=table("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
        ),
        tolerations=some(
            table(
                key=TEXT,
                operator=one_of("Exists", "Equal"),
                value=TEXT,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        containers=some(CONTAINER),
        volumes=some(VOLUME),
    ),
)
RAY_CLUSTER = table(
    "headGroupSpec",
    "rayVersion",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=table(mode=one_of("token", "disabled"), secretName=NAME, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=table(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=NUMBER,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        resources=table(requests=RESOURCES, limits=RESOURCES),
    ),
    headGroupSpec=table(
        "template",
        "rayStartParams",
        rayStartParams=TEXTS,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=FLAG,
        template=POD,
    ),
    workerGroupSpecs=some(
        table(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
            groupName=NAME,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            idleTimeoutSeconds=NUMBER,
            numOfHosts=POSITIVE,
            suspend=FLAG,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
SELECTOR = table(matchLabels=TEXTS)
KINDS = {
    "RayJob": (
        "ray.io/v1",
        table(
            "entrypoint",
            "rayClusterSpec",
            entrypoint=TEXT,
            submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
            backoffLimit=NUMBER,
            activeDeadlineSeconds=POSITIVE,
            preRunningDeadlineSeconds=POSITIVE,
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=NUMBER,
            runtimeEnvYAML=TEXT,
            suspend=FLAG,
            rayClusterSpec=RAY_CLUSTER,
        ),
    ),
    "RayCluster": ("ray.io/v1", RAY_CLUSTER),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        table(
            "podSelector",
            podSelector=SELECTOR,
            policyTypes=some(one_of("Ingress", "Egress")),
            ingress=some(
                table(**{"from": some(table(podSelector=SELECTOR, namespaceSelector=SELECTOR))})
            ),
        ),
    ),
}
SKYPILOT = table(
    "resources",
    "run",
    name=NAME,
    workdir=TEXT,
    num_nodes=POSITIVE,
    resources=table(
        infra={"type": "string", "pattern": r"^(k8s|kubernetes|aws|gcp|azure)(/.+)?$"},
        accelerators={"type": "string", "pattern": r"^[A-Za-z0-9-]+(:\d+)?$"},
        cpus={"type": "string", "pattern": r"^\d+\+?$"},
        memory={"type": "string", "pattern": r"^\d+\+?$"},
        image_id={"type": "string", "pattern": "^docker:"},
        disk_size=POSITIVE,
        use_spot=FLAG,
    ),
    volumes=TEXTS,
    file_mounts={"type": "object"},
    envs=TEXTS,
    secrets={"type": "object", "additionalProperties": {"type": "null"}},  # their values stay out
    setup=TEXT,
    run=TEXT,
)


def document(kind: str) -> dict[str, Any]:
    """The schema of a document of some kind of Kubernetes'."""
    version, spec = KINDS[kind]
    return table(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion=one_of(version),
        kind=one_of(kind),
        metadata=METADATA,
        spec=spec,
    )
