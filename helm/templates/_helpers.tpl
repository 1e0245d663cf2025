{{- /* Names, labels and the parts that several objects share. Numbers of values are floats to Helm: `int64` first. */}}

{{- define "gateway.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- /* At most 40 signs: what is put after it still fits into the 63 of a label. */}}
{{- define "gateway.fullname" -}}
{{- $name := include "gateway.name" . }}
{{- $whole := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $whole .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- /* What a selector looks for: (list $ "gateway"), (list $ "exporter"), … */}}
{{- define "gateway.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "gateway.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "gateway.labels" -}}
{{- $root := index . 0 -}}
{{ include "gateway.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* (dict "repository" … "tag" … "digest" …) */}}
{{- define "gateway.image" -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end }}
{{- end }}

{{- define "gateway.ownImage" -}}
{{- include "gateway.image" (merge (dict "tag" (default .Chart.AppVersion .Values.image.tag)) .Values.image) }}
{{- end }}

{{- define "gateway.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "gateway.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "gateway.secretName" -}}
{{- default (include "gateway.fullname" .) .Values.secrets.existingSecret }}
{{- end }}

{{- define "gateway.valkeyName" -}}
{{ include "gateway.fullname" . }}-valkey
{{- end }}

{{- define "gateway.valkeySecretName" -}}
{{- default (include "gateway.valkeyName" .) .Values.valkey.existingSecret }}
{{- end }}

{{- define "gateway.policiesName" -}}
{{- default (printf "%s-policies" (include "gateway.fullname" .)) .Values.policies.existingConfigMap }}
{{- end }}

{{- /* Of the documents as they are now; of an existing ConfigMap only where there is a cluster to ask. */}}
{{- define "gateway.policiesChecksum" -}}
{{- if .Values.policies.existingConfigMap }}
{{- (lookup "v1" "ConfigMap" .Release.Namespace .Values.policies.existingConfigMap).data | default dict | toJson | sha256sum }}
{{- else }}
{{- .Values.policies.documents | toJson | sha256sum }}
{{- end }}
{{- end }}

{{- /* One secret that stays what it was: (list $ NAME KEY) */}}
{{- define "gateway.kept" -}}
{{- $root := index . 0 }}
{{- $kept := (lookup "v1" "Secret" $root.Release.Namespace (index . 1)).data | default dict }}
{{- default (randAlphaNum 64 | b64enc) (index $kept (index . 2)) }}
{{- end }}

{{- /* The "restricted" profile of the Pod Security Standards, for a pod … (the uid) */}}
{{- define "gateway.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ . }}
  runAsGroup: {{ . }}
  fsGroup: {{ . }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* … and for a container. */}}
{{- define "gateway.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* No token, and no variables of the cluster's Services: that of one named `gateway` is GATEWAY_PORT. */}}
{{- define "gateway.podBasics" -}}
serviceAccountName: {{ include "gateway.serviceAccount" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* (list $ COMPONENT LABELS). Of versions nothing, so that a new chart replaces only what it changes. What is no gateway reads its policies when it starts, and only then. */}}
{{- define "gateway.podMetadata" -}}
{{- $root := index . 0 -}}
labels:
  {{- include "gateway.selector" . | nindent 2 }}
  {{- with merge (dict) (index . 2) $root.Values.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ index . 1 }}
  {{- if or $root.Values.policies.rollOnChange (ne "gateway" (index . 1)) }}
  checksum/policies: {{ include "gateway.policiesChecksum" $root }}
  {{- end }}
  {{- with $root.Values.podAnnotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- /* A variable from a Secret: (list NAME SECRET KEY) */}}
{{- define "gateway.secretVariable" -}}
- name: {{ index . 0 | quote }}
  valueFrom: {secretKeyRef: {name: {{ index . 1 | quote }}, key: {{ index . 2 | quote }}}}
{{- end }}

{{- /* What every command of the gateway is told: where things are. */}}
{{- define "gateway.env" -}}
- {name: GATEWAY_LOG, value: {{ .Values.log }}}
- {name: GATEWAY_STATE, value: /var/lib/gateway}
- {name: GATEWAY_POLICIES, value: /etc/gateway/policies}
{{- if .Values.valkey.enabled }}
{{ include "gateway.secretVariable" (list "VALKEY_PASSWORD" (include "gateway.valkeySecretName" .) "password") }}
- {name: GATEWAY_REDIS_URL, value: "redis://:$(VALKEY_PASSWORD)@{{ include "gateway.valkeyName" . }}:6379/0"}
{{- else }}
{{ include "gateway.secretVariable" (list "GATEWAY_REDIS_URL" .Values.store.existingSecret .Values.store.key) }}
{{- end }}
{{- range .Values.extraEnv }}
- {name: {{ .name | quote }}, value: {{ .value | quote }}}
{{- end }}
{{- end }}

{{- define "gateway.mounts" -}}
- {name: policies, mountPath: /etc/gateway/policies, readOnly: true}
- {name: state, mountPath: /var/lib/gateway}
- {name: tmp, mountPath: /tmp}
{{- range $i, $file := .Values.secrets.files }}
- {name: secret-{{ $i }}, mountPath: {{ $file.path | quote }}, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* What the spools of all workers may hold, and 64 MiB for other files: a pod that has more is evicted. */}}
{{- define "gateway.volumes" -}}
{{- $mebibytes := div (mul (int64 .Values.workers) (int64 .Values.spoolMost)) 1048576 -}}
- name: policies
  configMap: {name: {{ include "gateway.policiesName" . | quote }}}
- name: state
  emptyDir: {sizeLimit: {{ add $mebibytes 64 }}Mi}
- name: tmp
  emptyDir: {}
{{- range $i, $file := .Values.secrets.files }}
- name: secret-{{ $i }}
  secret: {secretName: {{ $file.secret | quote }}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Bytes, of a quantity of Kubernetes or of Valkey. */}}
{{- define "gateway.bytes" -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $powers := dict "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "kb" 1024 "mb" 1048576 "gb" 1073741824 -}}
{{- mulf (trimSuffix $unit .) (dig $unit 1 $powers) -}}
{{- end }}

{{- /* What is wrong with values that are each for themselves well, told at once. */}}
{{- define "gateway.checks" -}}
{{- $v := .Values }}
{{- $wrong := list }}
{{- if regexMatch "^[0-9]" (include "gateway.fullname" .) }}
{{- $wrong = append $wrong (printf "the release is called %s, expected a name that begins with a letter, as those of Services do, or fullnameOverride" .Release.Name) }}
{{- end }}
{{- if and $v.autoscaling.enabled $v.keda.enabled }}
{{- $wrong = append $wrong "autoscaling.enabled and keda.enabled are both true, expected one of them: two would fight over the replicas" }}
{{- end }}
{{- if and $v.keda.enabled (not $v.keda.serverAddress) (gt (int64 $v.autoscaling.targetInFlight) 0) }}
{{- $wrong = append $wrong "keda.serverAddress is empty, expected the address of Prometheus, such as http://prometheus.monitoring:9090" }}
{{- end }}
{{- if and (or $v.autoscaling.enabled $v.keda.enabled) (gt (int64 $v.autoscaling.minReplicas) (int64 $v.autoscaling.maxReplicas)) }}
{{- $wrong = append $wrong (printf "autoscaling.minReplicas is %d, expected at most autoscaling.maxReplicas, %d" (int64 $v.autoscaling.minReplicas) (int64 $v.autoscaling.maxReplicas)) }}
{{- end }}
{{- if and (or $v.autoscaling.enabled $v.keda.enabled) (eq 0 (int64 $v.autoscaling.targetCPU)) (eq 0 (int64 $v.autoscaling.targetInFlight)) }}
{{- $wrong = append $wrong "autoscaling.targetCPU and autoscaling.targetInFlight are both 0, expected one to scale by" }}
{{- end }}
{{- if and (or $v.autoscaling.enabled $v.keda.enabled) (gt (int64 $v.autoscaling.targetCPU) 0) (not (dig "requests" "cpu" "" $v.resources)) }}
{{- $wrong = append $wrong "resources.requests.cpu is missing, expected one: autoscaling.targetCPU is a share of it" }}
{{- end }}
{{- if and $v.serviceMonitor.enabled $v.podMonitor.enabled }}
{{- $wrong = append $wrong "serviceMonitor.enabled and podMonitor.enabled are both true, expected one of them: everything would be counted twice" }}
{{- end }}
{{- if and $v.prometheusRule.enabled (not (or $v.serviceMonitor.enabled $v.podMonitor.enabled)) }}
{{- $wrong = append $wrong "prometheusRule.enabled is true without figures to look at, expected serviceMonitor.enabled or podMonitor.enabled too" }}
{{- end }}
{{- if and $v.valkey.enabled $v.store.existingSecret }}
{{- $wrong = append $wrong "valkey.enabled is true and store.existingSecret is set, expected one store: set valkey.enabled to false to use your own" }}
{{- end }}
{{- with dig "limits" "memory" "" $v.valkey.resources | toString }}
{{- if and $v.valkey.enabled (ge (include "gateway.bytes" $v.valkey.maxMemory | float64) (include "gateway.bytes" . | float64)) }}
{{- $wrong = append $wrong (printf "valkey.maxMemory is %s, expected less than valkey.resources.limits.memory, %s: it would be killed before it is full" $v.valkey.maxMemory .) }}
{{- end }}
{{- end }}
{{- if not (or $v.valkey.enabled $v.store.existingSecret) }}
{{- $wrong = append $wrong "there is no store, expected store.existingSecret, a Secret that holds its address, or valkey.enabled" }}
{{- end }}
{{- if and $v.policies.documents $v.policies.existingConfigMap }}
{{- $wrong = append $wrong "policies.documents and policies.existingConfigMap are both set, expected one of them" }}
{{- end }}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) }}
{{- $wrong = append $wrong "ingress.hosts is empty, expected at least one host name" }}
{{- end }}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) }}
{{- $wrong = append $wrong "httpRoute.parentRefs is empty, expected at least one Gateway" }}
{{- end }}
{{- range $name, $exporter := $v.exporters }}
{{- if ne (empty $exporter.claim) (empty $exporter.path) }}
{{- $wrong = append $wrong (printf "exporters.%s has one of claim and path, expected both or none" $name) }}
{{- end }}
{{- end }}
{{- if $wrong }}{{ fail (printf "\n%s" (join "\n" $wrong)) }}{{ end }}
{{- end }}

{{- /* The figures of this release, as its ServiceMonitor or PodMonitor labels them. */}}
{{- define "gateway.matcher" -}}
namespace="{{ .Release.Namespace }}",app_kubernetes_io_instance="{{ .Release.Name }}"
{{- end }}
